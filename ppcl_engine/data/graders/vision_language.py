"""A vision-language model as a grader: any folder that transformers reads as one, from this machine
alone."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...system.atomic import read_object
from ...system.optional_packages import transformers
from ..codecs.pipeline import read_part, read_tokenizer
from ..codecs.qwen_image import IMAGE_TOKEN, StillsProcessor
from .base import ASK, READ, SIMILARITY, Grader

if TYPE_CHECKING:
    from PIL.Image import Image

STILLS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
"""model types whose own processor also reads videos, for which transformers wants torchvision"""
YES, NO = ("Yes", "yes"), ("No", "no")
ANSWER = "{} Answer with yes or no."
FITS = "Does this picture fit the following text? {}"
WRITE = "Write out all of the text in this picture and nothing else."
READ_TOKENS = 1024
TOKEN_KINDS = "mm_token_type_ids"
"""an input that transformers before 5 finds out by itself"""


class VisionLanguageModel(Grader):
    """Raises ValueError for a folder that is missing or holds another kind of model."""

    does = frozenset({ASK, READ, SIMILARITY})

    def __init__(self, folder: Path, device: str):
        self.folder, self.device = folder, device
        self.dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        if not (folder / "config.json").exists():
            raise ValueError(
                f"{folder} has no config.json; name the folder of a vision-language model, such as "
                "Qwen2.5-VL-7B-Instruct, with --judge"
            )
        transformers("--judge")
        self.config = read_object(folder / "config.json")
        _check_kind(folder, self.config)
        self._model: Any = None

    @property
    def name(self) -> str:
        text = self.config.get("text_config") or self.config
        sizes = [f"{text[key]} {unit}" for key, unit in SIZES.items() if key in text]
        return f"{self.config['model_type']} ({', '.join([self.folder.name, *sizes])})"

    def ask(self, image: Image, question: str) -> float:
        """Among the first tokens of yes and no alone."""
        self._open()
        with torch.no_grad():
            inputs = self._inputs(image, ANSWER.format(question))
            logits = self._model(**inputs).logits[0, -1].float()
        yes, no = (logits[tokens].logsumexp(0) for tokens in self._answers)
        return float(torch.sigmoid(yes - no))

    def read(self, image: Image) -> str:
        self._open()
        inputs = self._inputs(image, WRITE)
        with torch.no_grad():
            tokens = self._model.generate(**inputs, max_new_tokens=READ_TOKENS, do_sample=False)
        written = tokens[0, inputs["input_ids"].shape[1] :]
        return self._tokenizer.decode(written, skip_special_tokens=True)

    def similarity(self, image: Image, text: str) -> float:
        """The probability of yes when it is asked whether the text fits (VQAScore, Lin et al.
        2024)."""
        return self.ask(image, FITS.format(text))

    def _inputs(self, image: Image, text: str) -> dict[str, torch.Tensor]:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        written = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = self._processor(text=[written], images=[image.convert("RGB")], return_tensors="pt")
        return {
            name: t.to(self.device, self.dtype) if t.is_floating_point() else t.to(self.device)
            for name, t in inputs.items()
            if name != TOKEN_KINDS or name in self._reads
        }

    def _open(self) -> None:
        if self._model is not None:
            return
        from transformers import AutoModelForImageTextToText

        self._processor = open_processor(self.folder, self.config)
        self._tokenizer = self._processor.tokenizer
        self._answers = _first_tokens(self._tokenizer, self.folder)
        model: Any = read_part(AutoModelForImageTextToText, self.folder, dtype=self.dtype)
        self._reads = signature(model.forward).parameters
        self._model = model.to(self.device)


SIZES = {"num_hidden_layers": "layers", "hidden_size": "wide"}
"""entry of a configuration -> how `name` says it"""


class ChatStills:
    """The processor of a Qwen model, for one picture in a message, without torchvision."""

    def __init__(self, images, tokenizer, template: str | None):
        self.tokenizer, self.template = tokenizer, template
        self._stills = StillsProcessor(images, tokenizer)
        self._image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def apply_chat_template(self, messages: list, **options) -> str:
        return self.tokenizer.apply_chat_template(messages, chat_template=self.template, **options)

    def __call__(self, text: list[str], images: list, return_tensors: str):
        inputs = self._stills(text, images, padding=False, return_tensors=return_tensors)
        # positions in rows and columns are computed where this says that a token is a picture's
        inputs[TOKEN_KINDS] = (inputs["input_ids"] == self._image_token).int()
        return inputs


def open_processor(folder: Path, config: dict) -> Any:
    """What makes a model's inputs from a picture and a message."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    if config["model_type"] in STILLS:
        images = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        return ChatStills(images, read_tokenizer(AutoTokenizer, folder), _template(folder))
    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True)
    except ImportError as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"{folder}: {reason}; install it, or name another --judge") from None


def _template(folder: Path) -> str | None:
    """The chat template beside the tokenizer's files, whose own may know no pictures; None where
    there is none."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").exists():
        return read_object(folder / "chat_template.json").get("chat_template")
    return None


def _first_tokens(tokenizer, folder: Path) -> tuple[list[int], list[int]]:
    """The first token of every way to write yes, and no. Raises ValueError where one begins both."""
    yes, no = (
        sorted({tokenizer.encode(word, add_special_tokens=False)[0] for word in words})
        for words in (YES, NO)
    )
    if set(yes) & set(no):
        raise ValueError(f"{folder}: its tokenizer begins yes and no alike; name another --judge")
    return yes, no


def _check_kind(folder: Path, config: dict) -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN,
    )

    kind = config.get("model_type")
    if kind not in KNOWN:
        raise ValueError(
            f"{folder} is a {kind!r}, not a vision-language model that this transformers reads; name "
            "another with --judge, such as Qwen2.5-VL-7B-Instruct"
        )
