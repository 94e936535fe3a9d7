"""What is not a regular file is refused before it is opened."""

import os

import pytest

from ppcl_engine import open_model
from ppcl_engine.system.atomic import read_json
from ppcl_engine.system.tensor_files import TensorFile


def test_a_pipe_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    for read in (TensorFile, read_json, open_model):
        with pytest.raises(
            ValueError, match="model.safetensors is a named pipe; give a regular file"
        ):
            read(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="/dev/zero is a device"):
        TensorFile("/dev/zero")
