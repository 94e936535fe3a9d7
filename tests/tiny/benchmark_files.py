"""The files of the five benchmarks, in their own formats, with a few made-up prompts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

DPG_COLUMNS = (
    *("item_id", "text", "keywords", "proposition_id", "dependency", "category_broad"),
    *("category_detailed", "tuple", "question_natural_language"),
)
PROMPTS = ("a red cat", "the image of the background", "by the sea, text")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_csv(path: Path, columns, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def write_lines(path: Path, rows) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def dpg_file(folder: Path, prompts=PROMPTS) -> Path:
    """Three questions a prompt; the second depends on the first, the third on both."""
    rows = []
    for number, prompt in enumerate(prompts):
        for proposition, parents in ((1, "0"), (2, "1"), (3, "1,2")):
            about = ("entity", "whole", f"entity - whole ({proposition})")
            rows.append(
                (f"item{number}", prompt, "", proposition, parents, *about, f"{proposition}?")
            )
    return write_csv(folder / "dpg_bench.csv", DPG_COLUMNS, rows)


def geneval_file(folder: Path) -> Path:
    bench, red = {"class": "bench", "count": 1}, {"class": "dog", "count": 1, "color": "red"}
    above = {"class": "clock", "count": 1, "position": ["left of", 0]}
    rows = [
        {"tag": "single_object", "include": [bench], "prompt": "a photo of a bench"},
        {"tag": "colors", "include": [red], "prompt": "a photo of a red dog"},
        {"tag": "position", "include": [bench, above], "prompt": "a clock left of a bench"},
        {
            "tag": "counting",
            "include": [{"class": "bus", "count": 3}],
            "exclude": [{"class": "bus", "count": 4}],
            "prompt": "a photo of three buses",
        },
    ]
    return write_lines(folder / "evaluation_metadata.jsonl", rows)


def longtext_file(folder: Path) -> Path:
    about = {"category": "sign", "length": "short", "text_length": 3}
    rows = [
        {**about, "prompt": "a sign", "text": ["OPEN, daily!", "Don't wait"], "prompt_id": 0},
        {**about, "prompt": "a poster", "text": ["SALE"], "prompt_id": 1},
    ]
    return write_lines(folder / "text_prompts.jsonl", rows)


def oneig_file(folder: Path) -> Path:
    columns = ("category", "id", "prompt_en", "type", "prompt_length", "class")
    rows = [
        ("Portrait", "000", "two people on a bench", "NP", "short", "None"),
        ("Text_Rendering", "000", "a slide", "T", "short", "None"),
        ("Knowledge_Reasoning", "000", "a map of mountains", "T", "short", "geography"),
    ]
    scripts = folder / "scripts"
    write_csv(
        scripts / "text" / "text_content.csv",
        ("", "id", "prompt_en", "text_content"),
        [(0, "000", "a slide", "['Five G', 'Urban']")],
    )
    tables = {"question": {"1": "Are there people?", "2": "Are there two?"}}
    tables["dependency"] = {"1": [0], "2": [1]}
    entry = {name: json.dumps(table) for name, table in tables.items()}  # as the authors keep them
    for name, content in (
        ("alignment/Q_D/human.json", {"000": entry}),
        ("reasoning/gt_answer.json", {"000": "The highest mountain is Everest."}),
    ):
        path = scripts / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return write_csv(folder / "OneIG-Bench.csv", columns, rows)


def t2i_compbench_folder(folder: Path) -> Path:
    for name, lines in (
        ("color_val", "a green bench and a blue bowl\r\na red car and a white sheep\r\n"),
        ("spatial_val", "a giraffe next to a lamp\n"),
        ("non_spatial_val", "A person is looking at a rainbow.\n"),
        ("color_train", "never read\n"),
    ):
        (folder / f"{name}.txt").write_text(lines, newline="")
    return folder


def tiny_judge(folder: Path, kind: str = "qwen2_5_vl") -> Path:
    """A random vision-language model, in the layout of the released folders."""
    from transformers import Qwen2VLImageProcessorPil

    from .qwen_image_folder import text_encoder, vocabulary, write_tokenizer

    words = ["Yes", "No"]
    model = text_encoder(vocabulary(words)) if kind == "qwen2_5_vl" else qwen3(vocabulary(words))
    model.save_pretrained(folder)
    write_tokenizer(folder, words)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}))
    patch = model.config.vision_config.patch_size
    side = 2 * 2 * patch
    Qwen2VLImageProcessorPil(
        patch_size=patch, min_pixels=side**2, max_pixels=(2 * side) ** 2
    ).save_pretrained(folder)
    return folder


def qwen3(tokens: dict[str, int]):
    """A tiny random Qwen3-VL."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = {
        "vocab_size": len(tokens),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "eos_token_id": tokens["<|im_end|>"],
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokens["<|image_pad|>"],
        video_token_id=tokens["<|video_pad|>"],
        vision_start_token_id=tokens["<|vision_start|>"],
        vision_end_token_id=tokens["<|vision_end|>"],
    )
    return Qwen3VLForConditionalGeneration(config)
