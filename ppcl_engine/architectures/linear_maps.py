"""What is known of the linear maps inside a block: what they read, which groups their outputs form,
and which outputs may change their order together. Data by architecture, with diffusers' names."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .folded import BasisMap, TableMap
from .modules import AnyModule

HEADS_OUT = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
HEADS_IN = ("to_out.0", "to_add_out")


@dataclass(frozen=True, kw_only=True)
class Passed:
    """Channels passed between linear maps that may be reordered: `givers` write them and only
    `takers` read them.

    In between, each channel is only treated by itself (an activation, attention's weights).
    """

    givers: tuple[str, ...]
    """maps whose outputs these channels are"""
    takers: tuple[str, ...]
    """maps that read them"""
    by_head: str = ""
    """the attention whose heads keep their channels to themselves; empty: any order"""
    first: str = ""
    """where the channels begin among a taker's inputs: empty: at 0; "width": behind that many
    others"""


@dataclass(frozen=True, kw_only=True)
class LinearMaps:
    """What is known of the linear maps of one architecture's blocks."""

    conditioning: tuple[str, ...]
    """prefixes of the maps that read the conditioning and return a modulation in chunks"""
    chunk_like: str = ""
    """the norm that is as wide as a modulation's chunk; empty: what the map reads is"""
    text: tuple[str, ...] = ()
    """prefixes of the maps that read text tokens, where some of these may be padding"""
    joint: tuple[str, ...] = ()
    """the same of the maps that read both streams as one sequence"""
    passed: tuple[Passed, ...] = ()
    """channels that may be reordered"""
    last: tuple[tuple[str, str], ...] = ()
    """(stream, the map whose output is the last that a block adds to it), where nothing but a gate
    stands between them"""


def _ffn(name: str) -> Passed:
    return Passed(givers=(f"{name}.net.0.proj",), takers=(f"{name}.net.2",))


JOINT = Passed(
    givers=("attn.to_v", "attn.add_v_proj"),
    takers=("attn.to_out.0", "attn.to_add_out"),
    by_head="attn",
)

LINEAR_MAPS = {
    "qwen_image": LinearMaps(
        conditioning=("img_mod.", "txt_mod."),
        text=(
            "attn.add_",
            "attn.to_add_out",
            "txt_mlp",
            "txt_norm1.projection",
            "correction.maps.text",
        ),
        passed=(_ffn("img_mlp"), _ffn("txt_mlp"), JOINT),
        last=(("image", "img_mlp.net.2"), ("text", "txt_mlp.net.2")),
    ),
    "flux1": LinearMaps(
        conditioning=("norm.linear", "norm1.linear", "norm1_context.linear"),
        passed=(
            _ffn("ff"),
            _ffn("ff_context"),
            JOINT,
            Passed(givers=("attn.to_v",), takers=("proj_out",), by_head="attn"),
            Passed(givers=("proj_mlp",), takers=("proj_out",), first="width"),
        ),
        last=(("image", "ff.net.2"), ("text", "ff_context.net.2"), ("joint", "proj_out")),
    ),
    "sd35": LinearMaps(
        conditioning=("norm1.linear", "norm1_context.linear"),
        passed=(
            _ffn("ff"),
            _ffn("ff_context"),
            JOINT,
            Passed(givers=("attn2.to_v",), takers=("attn2.to_out.0",), by_head="attn2"),
        ),
        last=(("image", "ff.net.2"), ("text", "ff_context.net.2")),
    ),
    "z_image": LinearMaps(
        conditioning=("adaLN_modulation.",),
        chunk_like="attention_norm1",
        text=("correction.maps.text",),
        joint=("attention.", "feed_forward"),
        passed=(
            Passed(givers=("feed_forward.w1", "feed_forward.w3"), takers=("feed_forward.w2",)),
            Passed(givers=("attention.to_v",), takers=("attention.to_out.0",), by_head="attention"),
        ),
    ),
    "qwen_image_21": LinearMaps(
        conditioning=(),
        text=("correction.maps.text",),
        joint=("attn.", "img_mlp"),
        passed=(
            Passed(givers=("img_mlp.proj", "img_mlp.gate_layer"), takers=("img_mlp.out",)),
            Passed(givers=("attn.to_v",), takers=("attn.to_out.0",), by_head="attn"),
        ),
    ),
    "krea2": LinearMaps(
        conditioning=(),
        text=("correction.maps.text",),
        joint=("attn.", "ff"),
        # not attention's: several heads read the same values, each behind a gate of its own
        passed=(Passed(givers=("ff.gate", "ff.up"), takers=("ff.down",)),),
    ),
}


def masked_stream(architecture: str, name: str) -> str | None:
    """ "text" or "joint": what a map reads, where that may hold padding."""
    maps = LINEAR_MAPS[architecture]
    streams = {"text": maps.text, "joint": maps.joint}
    return next((s for s, prefixes in streams.items() if name.startswith(prefixes)), None)


def linear_maps(block: AnyModule) -> dict[str, nn.Linear]:
    """The block's linear maps by name, without the tables and bases of folded modulations."""
    kinds = (TableMap, BasisMap)
    return {
        n: m
        for n, m in block.named_modules()
        if isinstance(m, nn.Linear) and not isinstance(m, kinds)
    }


def known_rows(architecture: str, block: AnyModule, name: str) -> tuple[int, ...]:
    """Sizes of the groups that a map's outputs are known to form: heads, chunks of a modulation."""
    module = block.get_submodule(name)
    if name.startswith(LINEAR_MAPS[architecture].conditioning):
        like = LINEAR_MAPS[architecture].chunk_like
        size = len(block.get_submodule(like).weight) if like else module.in_features
        return (size,) * (module.out_features // size)
    parent, _, leaf = name.rpartition(".")
    return _by_head(block, parent, module.out_features) if leaf in HEADS_OUT else ()


def known_columns(architecture: str, block: AnyModule, name: str) -> tuple[int, ...]:
    """The same for its inputs: heads, attention | mlp of a fused map."""
    module = block.get_submodule(name)
    for leaf in HEADS_IN:
        if name.endswith(f".{leaf}"):
            return _by_head(block, name.removesuffix(f".{leaf}"), module.in_features)
    fused = any(
        name in passed.takers and passed.first for passed in LINEAR_MAPS[architecture].passed
    )
    width = module.out_features
    return (width, module.in_features - width) if fused and module.in_features > width else ()


def present(passed: Passed, block: AnyModule) -> bool:
    """Whether all givers are plain maps of the block, and the takers that are there read what they
    give."""
    maps = linear_maps(block)
    if not all(type(maps.get(name)) is nn.Linear for name in passed.givers):
        return False
    size = maps[passed.givers[0]].out_features
    takers = [maps[name] for name in passed.takers if name in maps]
    return bool(takers) and all(
        taker.in_features >= first_column(passed, taker) + size for taker in takers
    )


def first_column(passed: Passed, taker: nn.Linear) -> int:
    """Where the channels begin among a taker's inputs."""
    return taker.out_features if passed.first else 0


def sections(passed: Passed, block: AnyModule) -> int:
    """The number of equal runs of channels that keep to themselves, such as heads."""
    return block.get_submodule(passed.by_head).heads if passed.by_head else 1


def _by_head(block: AnyModule, attention: str, size: int) -> tuple[int, ...]:
    """Keys and values may have fewer heads, of the same size."""
    module = block.get_submodule(attention)
    head = module.to_q.out_features // module.heads
    return (head,) * (size // head)
