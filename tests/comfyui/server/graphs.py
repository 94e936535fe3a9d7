"""Graphs in API form, node by node, with the widgets' own defaults; and the one that makes a small pruned model."""

from __future__ import annotations

from dataclasses import dataclass, field

CAPTIONS = "\n".join(f"a {a} {c} on a {b} circle, green background" for a, b, c in (["red", "blue", "K"], ["white", "black", "7"], ["blue", "red", "Q"], ["black", "white", "S"]))  # fmt: skip
TINY = "tiny.safetensors"
Link = list


@dataclass
class Graph:
    """known: the server's /object_info. first: number of the first node; another one, and nothing is cached."""

    known: dict
    first: int = 1
    nodes: dict[str, dict] = field(default_factory=dict)

    def add(self, kind: str, **inputs) -> str:
        number = str(self.first + len(self.nodes))
        self.nodes[number] = {"class_type": kind, "inputs": {**self.defaults(kind), **inputs}}
        return number

    def defaults(self, kind: str) -> dict:
        rows = self.known[kind]["input"]
        found = {}
        for name, (of, *more) in {**rows.get("required", {}), **rows.get("optional", {})}.items():
            options = more[0] if more else {}
            choices = of if isinstance(of, list) else options.get("options")
            if "default" in options:
                found[name] = options["default"]
            elif choices:
                found[name] = choices[0]
        return found

    def shown(self, link: Link) -> str:
        """A node that shows a text, so that the history has it."""
        return self.add("PreviewAny", source=link)

    def recording(self, model_file: str = TINY, seed: int = 7, **limits) -> tuple[Link, Link]:
        """(run, the sampler's latent)"""
        model = self.add("PPCL_LoadModel", file=model_file)
        limits = {"samples": 16, "each_picture": 4, "batch": 4, **limits}
        record = self.add("PPCL_RecordCalibration", model=[model, 0], model_file=model_file, **limits)
        words = self.add("PPCL_DemoCaption", captions=CAPTIONS)
        latent = self.add(
            "KSampler", model=[record, 0], positive=[words, 0], negative=[words, 1], latent_image=[words, 2],
            seed=seed, steps=4, cfg=2.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        )  # fmt: skip
        return [record, 1], [latent, 0]

    def detected(self, **settings) -> Link:
        """Calibration, probes and a plan of the tiny teacher."""
        run, latent = self.recording()
        probe = self.add("PPCL_Probe", run=run, after=latent, train_steps=0)
        settings = {"remove": 2, "longest": 3, "bootstrap": 4, "samples": 16, **settings}
        return [self.add("PPCL_Detect", run=[probe, 0], **settings), 0]

    def distilled(self, run: Link, **settings) -> str:
        settings = {"rounds": 2, "updates": 4, "learning_rate": 1e-3, "preview_seconds": 1, **settings}
        return self.add("PPCL_DistillDepth", run=run, **settings)
