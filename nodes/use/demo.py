"""The demo's own nodes: captions and pictures of the small teacher that comes with this pack.

Its model is loaded and sampled by the same nodes as any other. Nothing is downloaded.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from comfy.latent_formats import Wan21
from comfy_api.v0_0_2 import io

from ...ppcl_engine.data.codecs import open_codec
from ...ppcl_engine.data.codecs.table import TableCodec
from ..node import Node
from ..paths import demo_teacher

CAPTIONS = (
    "a white K on a blue circle, yellow background\na red 7 on a white hexagon, green background"
)
MOST = 64  # captions at once
CHANNELS, ROWS, COLUMNS = 16, 12, 12


@lru_cache(maxsize=1)
def codec() -> TableCodec:
    return open_codec(demo_teacher())


def encode(text: str):
    """(positive, negative, latent) for one picture per line. Raises ValueError, in one line, for
    captions that the teacher cannot draw."""
    captions = [line.strip() for line in text.split("\n") if line.strip()]
    if not 0 < len(captions) <= MOST:
        raise ValueError(f"{len(captions)} captions are given; write 1 to {MOST}, one a line")
    lengths = {len(codec().tokenize(caption)) for caption in captions}
    if len(lengths) > 1:
        counts = " and ".join(map(str, sorted(lengths)))
        raise ValueError(
            f"captions drawn together need the same number of words, these have {counts}; draw them apart"
        )
    latent = torch.zeros(len(captions), CHANNELS, 1, ROWS, COLUMNS)
    return conditioning(captions), conditioning([""]), {"samples": latent}


def conditioning(captions: list[str]) -> list:
    """The host's conditioning. Its pooled text, which some models read, is the mean of the words."""
    text = codec().text(captions)
    words, mask = text["encoder_hidden_states"], text["encoder_hidden_states_mask"][..., None]
    return [[words, {"pooled_output": (words * mask).sum(1) / mask.sum(1)}]]


def decode(samples: torch.Tensor, enlarge: int) -> torch.Tensor:
    """Pictures [n, height, width, 3] from the host's latents. When sampling ends, the host scales
    latents of this architecture for its own VAE; the demo's tables need them unscaled."""
    if samples.ndim == 4:
        samples = samples.unsqueeze(2)
    if tuple(samples.shape[1:]) != (CHANNELS, 1, ROWS, COLUMNS):
        shape = " x ".join(map(str, samples.shape[1:]))
        raise ValueError(
            f"the demo's latents are {CHANNELS} x 1 x {ROWS} x {COLUMNS}, this one is {shape}; "
            "use the latent of Demo Caption (PPCL)"
        )
    latents = Wan21().process_in(samples.float().cpu())[:, :, 0]
    pictures = codec().pictures(latents).movedim(1, -1)
    return pictures.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)


class DemoCaption(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PPCL_DemoCaption",
            display_name="Demo Caption (PPCL)",
            category="PPCL/demo",
            description="Captions for the small teacher that comes with this pack, and the empty latent it starts from.",
            inputs=[
                io.String.Input(
                    "captions",
                    multiline=True,
                    default=CAPTIONS,
                    tooltip='One picture a line, as "a white K on a blue circle, yellow background". Characters A-Z and '
                    "2-9; circle, square, diamond, hexagon; eight colours.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="latent"),
            ],
        )

    @classmethod
    def perform(cls, captions) -> io.NodeOutput:
        return io.NodeOutput(*encode(captions))


class DemoDecode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PPCL_DemoDecode",
            display_name="Demo Decode (PPCL)",
            category="PPCL/demo",
            description="Pictures of 48 x 48 pixels from the demo's latents.",
            inputs=[
                io.Latent.Input("latent", tooltip="What KSampler made with the demo's model."),
                io.Int.Input(
                    "enlarge",
                    default=4,
                    min=1,
                    max=16,
                    tooltip="Times that every pixel is repeated, both ways.",
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def perform(cls, latent, enlarge) -> io.NodeOutput:
        return io.NodeOutput(decode(latent["samples"], enlarge))
