"""Folded modulations in the host: a table draws the very same latents, a basis stays within its bound, on every variant,
with the host's own samplers, guidance on; a new schedule costs one pass, a known one nothing."""

import json
import sys

import comfy.hooks
import comfy.samplers
import comfy.utils
import folder_paths
import pytest
import torch

from ppcl_engine.config_files import FoldConfig
from ppcl_engine.files import TensorFile, write_tensors
from ppcl_engine.stages.fold import fold

from ...released_models import INTERVALS, KEPT, LISTS, TEACHER_BLOCKS, released_state, write_folder
from .conftest import relative_error
from .test_parity import VARIANTS
from .test_stock_nodes import control  # noqa: F401 - a fixture

SAMPLERS = [name for name in comfy.samplers.SAMPLER_NAMES if name not in ("dpm_adaptive", "dpm_fast")]
TRAINED_BOUND = 0.01
BOUND = 0.5  # of a random model of width 32, whose embedding has no low rank
opened: list[str] = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)


@pytest.fixture(scope="module")
def drawn(run_node, inputs):
    """Latents that the host's own sampler draws."""

    def run(model, steps: int = 3, sampler: str = "euler", samples: int = 1, cfg: float = 2.0, equal: bool = True):
        text = inputs.text.expand(samples, -1, -1)
        negative = -text if equal else text[:, ::2]
        empty = torch.zeros(samples, *inputs.latents.shape[1:])
        (found,) = run_node(
            "KSampler", model=model, seed=3, steps=steps, cfg=cfg, sampler_name=sampler, scheduler="simple",
            positive=[[text, {}]], negative=[[negative, {}]], latent_image={"samples": empty}, denoise=1.0,
        )  # fmt: skip
        return found["samples"]

    return run


@pytest.fixture(scope="module", autouse=True)
def loose_bound(pack):
    """A random model keeps no useful bound."""
    module = pack("folding")
    old, module.BOUND = module.BOUND, BOUND
    yield
    module.BOUND = old


@pytest.fixture(scope="module")
def tables(models):
    """The folder of tables, empty."""
    return models.ppcl / "tables"


@pytest.fixture(scope="module")
def demo() -> tuple[str, str]:
    """The bundled teacher and its bundle, which every pack has."""
    return "demo/demo.ppcl.safetensors", "demo/teacher.safetensors"


@pytest.fixture(scope="module")
def plain(load, bundle, teacher):
    return load(bundle.name, base=teacher.name)


@pytest.fixture(scope="module")
def of_form(load, bundle, teacher):
    made = {}
    return lambda form: (
        made.setdefault(form, None)
        or made.update({form: load(bundle.name, base=teacher.name, fold=form)})
        or made[form]
    )


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_table_draws_the_same_bits(plain, of_form, switched, drawn, load, bundle, teacher, variant):
    for model in (of_form("table"), plain):
        assert (type(model.model.diffusion_model.transformer_blocks[0].img_mod[1]).__name__ == "TableMap") == (
            model is not plain
        )
    expected = drawn(switched(plain, variant=variant))
    assert torch.equal(drawn(switched(of_form("table"), variant=variant)), expected)
    alone = load(bundle.name, base=teacher.name, variant=variant, switchable=False, fold="table")
    assert torch.equal(drawn(alone), drawn(load(bundle.name, base=teacher.name, variant=variant, switchable=False)))


@pytest.mark.parametrize("variant", ["full", "small", "smallest", "1-2,text:3-4"])
def test_a_basis_stays_near(plain, of_form, switched, drawn, load, bundle, teacher, variant):
    expected = drawn(switched(plain, variant=variant))
    found = drawn(switched(of_form("basis"), variant=variant))
    alone = drawn(load(bundle.name, base=teacher.name, variant=variant, switchable=False, fold="basis"))
    assert 0 < relative_error(found, expected) < BOUND and 0 < relative_error(alone, expected) < BOUND


@pytest.mark.parametrize(("samples", "equal"), [(1, True), (1, False), (3, True), (3, False)])
def test_every_number_of_samples(plain, of_form, drawn, samples, equal):
    """Prompts of equal length go through the model together, others one after the other: other kernels, other bits."""
    options = {"samples": samples, "equal": equal}
    assert torch.equal(drawn(of_form("table"), **options), drawn(plain, **options))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(plain, of_form, drawn, sampler):
    """Those too that evaluate between the sigmas of their schedule."""
    assert torch.equal(drawn(of_form("table"), sampler=sampler, steps=4), drawn(plain, sampler=sampler, steps=4))


def test_a_sampler_that_decides_on_the_way(of_form, drawn):
    with pytest.raises(ValueError, match="the model's table has no timestep .* or fold with form basis"):
        drawn(of_form("table"), sampler="dpm_adaptive")
    assert drawn(of_form("basis"), sampler="dpm_adaptive").isfinite().all()


def test_a_new_schedule_costs_one_pass_and_a_known_one_nothing(load, bundle, teacher, drawn, plain, models):
    def files(steps: int, model) -> list[str]:
        start = len(opened)
        assert torch.equal(drawn(model, steps=steps), drawn(plain, steps=steps))
        roots = (str(models.ppcl), str(models.diffusion_models))
        return [name for name in opened[start:] if name.startswith(roots)]

    model = load(bundle.name, base=teacher.name, fold="table")
    first = files(6, model)
    assert sum(name.endswith(teacher.name) for name in first) == 2 * 2 * 6  # weight and bias of each, once
    assert files(6, model) == []
    assert files(5, model) and files(6, model) == [] and files(5, model) == []
    again = load(bundle.name, base=teacher.name, fold="table")  # its table is on disk now
    found = files(6, again)
    assert found and not any(name.endswith(teacher.name) for name in found)


def test_a_lora_changes_modulations(plain, of_form, drawn, run_node, switched, models, teacher):
    """As in the unfolded model, on the host's own loader; the branch without it keeps its bits."""
    generator, found = torch.Generator().manual_seed(8), {}
    for key in (k for k in TensorFile(teacher).keys() if "_mod.1.weight" in k):
        name, (out, into) = key.removesuffix(".weight"), TensorFile(teacher).shape(key)
        found[f"{name}.lora_A.weight"] = torch.randn(2, into, generator=generator) / into**0.5
        found[f"{name}.lora_B.weight"] = 0.5 * torch.randn(out, 2, generator=generator)
        found[f"{name}.diff_b"] = 0.1 * torch.randn(out, generator=generator)
    write_tensors(models.loras / "modulations.safetensors", found)

    def changed(model):
        return run_node("LoraLoaderModelOnly", model=model, lora_name="modulations.safetensors", strength_model=0.7)[0]

    for variant in ("full", "smallest", "3-4,ffn_image:1"):
        expected, without = (drawn(switched(m, variant=variant)) for m in (changed(plain), plain))
        assert relative_error(without, expected) > 0.1
        table = of_form("table")
        assert relative_error(drawn(switched(changed(table), variant=variant)), expected) < 1e-4
        assert torch.equal(drawn(switched(table, variant=variant)), without)
        basis = drawn(switched(changed(of_form("basis")), variant=variant))
        plain_error = relative_error(drawn(switched(of_form("basis"), variant=variant)), without)
        assert relative_error(basis, expected) < 2 * plain_error < relative_error(without, expected)


def test_a_new_schedule_with_a_lora_on(load, bundle, teacher, plain, drawn, run_node):
    options = {"lora_name": "modulations.safetensors", "strength_model": 0.7}
    table = load(bundle.name, base=teacher.name, fold="table")
    for model, steps in ((table, 3), (table, 5), (table, 3)):
        ours = drawn(run_node("LoraLoaderModelOnly", model=model, **options)[0], steps=steps)
        theirs = drawn(run_node("LoraLoaderModelOnly", model=plain, **options)[0], steps=steps)
        assert relative_error(ours, theirs) < 1e-4
        assert torch.equal(drawn(model, steps=steps), drawn(plain, steps=steps))


def test_lora_on_the_way_to_the_device(plain, of_form, drawn, run_node):
    """Too little memory for the model: weights are patched when they are used."""
    options = {"lora_name": "modulations.safetensors", "strength_model": 0.7}
    expected = drawn(run_node("LoraLoaderModelOnly", model=plain, **options)[0])
    for form in ("table", "basis"):
        model = run_node("LoraLoaderModelOnly", model=of_form(form), **options)[0]
        whole = drawn(model)
        model.partially_unload(torch.device("cpu"), 10**12)
        assert model.model.model_lowvram
        assert relative_error(drawn(model), whole) < 1e-4
        assert form == "basis" or relative_error(whole, expected) < 1e-4


@pytest.mark.parametrize("kind", ["dora", "embedder", "merge"])
def test_changes_that_cannot_be_followed_are_one_line(of_form, plain, drawn, run_node, models, kind):
    name = "time_text_embed.timestep_embedder.linear_1" if kind == "embedder" else "transformer_blocks.0.img_mod.1"
    into, out = (256, 32) if kind == "embedder" else (32, 192)
    stored = {f"{name}.lora_A.weight": torch.randn(2, into), f"{name}.lora_B.weight": torch.randn(out, 2)}
    if kind == "dora":
        stored[f"{name}.dora_scale"] = torch.ones(out, 1)
    write_tensors(models.loras / "other.safetensors", stored)
    if kind == "merge":
        (model,) = run_node("ModelMergeSimple", model1=of_form("table"), model2=plain, ratio=0.5)
    else:
        (model,) = run_node(
            "LoraLoaderModelOnly", model=of_form("table"), lora_name="other.safetensors", strength_model=1.0
        )
    with pytest.raises(ValueError, match="set fold to off") as error:
        drawn(model)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def demo_drawn(run_node):
    """Two captions of the demo, guidance on."""
    captions = "a white K on a blue circle, yellow background\na red 7 on a white hexagon, green background"
    positive, negative, latent = run_node("PPCL_DemoCaption", captions=captions)

    def run(model, steps: int = 4):
        (model,) = run_node("ModelSamplingAuraFlow", model=model, shift=1.0)
        return run_node(
            "KSampler", model=model, seed=3, steps=steps, cfg=2.0, sampler_name="euler", scheduler="simple",
            positive=positive, negative=negative, latent_image=latent, denoise=1.0,
        )[0]["samples"]  # fmt: skip

    return run


@pytest.mark.parametrize("switchable", [True, False], ids=["switched", "alone"])
def test_every_variant_of_the_bundled_teacher(load, switched, demo, demo_drawn, pack, monkeypatch, switchable):
    monkeypatch.setattr(pack("folding"), "BOUND", TRAINED_BOUND)
    models, drawn = {}, {}
    for variant in ("full", "large", "medium", "small", "smallest"):
        for form in ("off", "table", "basis"):
            options = {"base": demo[1], "weight_dtype": "fp32", "fold": form, "switchable": switchable}
            if switchable:
                model = models.setdefault(form, None) or load(demo[0], variant="full", **options)
                models[form] = model
                model = switched(model, variant=variant)
            else:
                model = load(demo[0], variant=variant, **options)
            drawn[form] = demo_drawn(model)
        assert torch.equal(drawn["table"], drawn["off"])
        assert 0 < relative_error(drawn["basis"], drawn["off"]) < 3 * TRAINED_BOUND


@pytest.mark.parametrize("variant", ["full", "small", "smallest"])
@pytest.mark.parametrize("form", ["table", "basis"])
def test_only_what_is_left_is_loaded(load, demo, pack, figures, form, variant):
    """Where the model was folded before; of the bundled teacher, whose vectors are few."""
    reading, paths = pack("reading"), pack("paths")
    request = reading.Request(
        path=paths.model_path(demo[0]), base=paths.model_path(demo[1]), variant=variant, switchable=False, fold=form
    )
    model = load(demo[0], base=demo[1], variant=variant, switchable=False, fold=form, weight_dtype="bf16")
    content = reading.content_of(request, make_fold=pack("folding").make_fold)
    held = sum(t.nbytes for t in model.model.diffusion_model.state_dict().values())
    figures("folded_load_bytes_ratio", content.bytes_read / held)
    assert 0.98 < content.bytes_read / held <= 1.02


def test_fp8(load, bundle, teacher, drawn):
    """The table is of the model that would run unfolded; small maps stay as they are."""
    options = {"base": teacher.name, "variant": "smallest", "switchable": False, "weight_dtype": "fp8_e4m3fn"}
    plain = load(bundle.name, **options)
    assert torch.equal(drawn(load(bundle.name, **options, fold="table")), drawn(plain))
    basis = load(bundle.name, **options, fold="basis")
    assert basis.model.diffusion_model.transformer_blocks[0].img_mod[1].weight.dtype is torch.float32
    assert relative_error(drawn(basis), drawn(plain)) < BOUND


def test_bf16(load, bundle, teacher, drawn):
    options = {"base": teacher.name, "variant": "smallest", "switchable": False, "weight_dtype": "bf16"}
    assert torch.equal(drawn(load(bundle.name, **options, fold="table")), drawn(load(bundle.name, **options)))


@pytest.fixture(scope="module")
def folded_file(teacher, tmp_path_factory, models):
    """Written by the engine for ComfyUI, beside the models."""

    def make(form: str, **settings):
        folder = tmp_path_factory.mktemp("folded")
        given = {"dtype": "float32", "host": "comfyui", "bound": BOUND, "name": f"folded_{form}", "device": "cpu"}
        path = fold(FoldConfig(path=teacher, form=form, run=folder, **{**given, **settings}))
        return path.replace(models.diffusion_models / path.name)

    return make


def test_a_folded_file_in_both_loaders(folded_file, load, run_node, drawn, teacher):
    expected = drawn(load(teacher.name))
    table, basis = folded_file("table", timesteps="1 0.6667 0.3333"), folded_file("basis")
    with pytest.raises(ValueError, match="no timestep .*no base file is given"):
        drawn(load(table.name))
    assert torch.equal(drawn(load(table.name, base=teacher.name)), expected)
    assert relative_error(drawn(load(basis.name)), expected) < BOUND
    (stock,) = run_node("UNETLoader", unet_name=basis.name, weight_dtype="default")
    assert torch.equal(drawn(stock), drawn(load(basis.name)))


def test_the_engines_own_table_has_the_hosts_bits(folded_file, load, drawn, teacher, plain):
    sampling = plain.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 3)
    path = folded_file("table", timesteps=" ".join(f"{t:.9g}" for t in sigmas[:-1].tolist()), name="same")
    assert torch.equal(drawn(load(path.name)), drawn(load(teacher.name)))


@pytest.mark.parametrize(
    ("widgets", "message"),
    [
        ({"fold": "cosine"}, "fold 'cosine' is unknown; known: off, table, basis"),
        (
            {"file": "folded_basis.safetensors", "base": "none", "fold": "table"},
            r"is folded already \(basis\); set fold to off",
        ),
        (
            {"file": "folded_table.safetensors", "base": "other.safetensors"},
            "is another model than folded_table.safetensors was",
        ),
        (
            {"file": "folded_basis.safetensors", "base": "teacher.safetensors"},
            "is no bundle, so it takes no base model",
        ),
        (
            {"base": "folded_basis.safetensors"},
            "is not folded, folded_basis.safetensors is: they do not belong together",
        ),
    ],
)
def test_bad_input_is_one_line(load, bundle, teacher, folded_file, make_model, save_model, models, widgets, message):
    for form in ("table", "basis"):
        folded_file(form)
    save_model(models.diffusion_models / "other.safetensors", make_model(1, in_channels=64, out_channels=16))
    given = {"file": bundle.name, "base": teacher.name, **widgets}
    with pytest.raises(ValueError, match=message) as error:
        load(**given)
    assert "\n" not in str(error.value)


def test_a_table_file_of_another_model_is_refused(load, bundle, teacher, drawn, tables):
    model = load(bundle.name, base=teacher.name, fold="table")
    drawn(model, steps=7)
    for path in tables.glob("*.safetensors"):
        file = TensorFile(path)
        if "ppcl_table" in file.metadata:
            about = json.loads(file.metadata["ppcl_table"])
            write_tensors(path, file.read_all(), {"ppcl_table": json.dumps({**about, "key": "x"})})
    again = load(bundle.name, base=teacher.name, fold="table")
    drawn(again, steps=7)  # made again beside it


def test_tables_are_no_models(models, pack, tables):
    assert list(tables.glob("*.safetensors"))
    assert not any(name.startswith("tables") for name in pack("paths").model_files())


@pytest.mark.parametrize("variant", ["full", "small", "smallest"])
def test_a_control_net(control, plain, of_form, switched, run_node, inputs, variant):  # noqa: F811
    """Its residuals land as in the unfolded model."""
    positive = control()

    def controlled(model):
        latent = {"samples": torch.zeros_like(inputs.latents)}
        return run_node(
            "KSampler", model=switched(model, variant=variant), seed=3, steps=2, cfg=2.0, sampler_name="euler",
            scheduler="simple", positive=positive, negative=[[inputs.text, {}]], latent_image=latent, denoise=1.0,
        )[0]["samples"]  # fmt: skip

    expected = controlled(plain)
    assert torch.equal(controlled(of_form("table")), expected)
    assert 0 < relative_error(controlled(of_form("basis")), expected) < BOUND


@pytest.mark.parametrize("form", ["table", "basis"])
def test_partly_on_the_device(of_form, drawn, form):
    model = of_form(form)
    expected = drawn(model)
    model.partially_unload(torch.device("cpu"), 10**12)
    assert model.model.model_lowvram
    assert torch.equal(drawn(model), expected)


def test_a_lora_on_a_part_of_the_schedule(of_form, plain, drawn, run_node, inputs):
    """The host's hooks patch while it samples."""
    lora = comfy.utils.load_torch_file(folder_paths.get_full_path("loras", "modulations.safetensors"))

    def hooked(model):
        hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=0.7, strength_clip=0.0)
        positive = comfy.hooks.set_hooks_for_conditioning([[inputs.text, {}]], hooks=hooks)
        latent = {"samples": torch.zeros_like(inputs.latents)}
        return run_node(
            "KSampler", model=model, seed=3, steps=2, cfg=1.0, sampler_name="euler", scheduler="simple",
            positive=positive, negative=[[inputs.text, {}]], latent_image=latent, denoise=1.0,
        )[0]["samples"]  # fmt: skip

    expected = hooked(plain)
    assert relative_error(hooked(of_form("table")), expected) < 1e-4
    assert relative_error(drawn(of_form("table")), drawn(plain)) == 0


def test_released_models(load, drawn, models, make_model, model_config):
    """Of the method's authors, width-pruned, with old and new text projections; no plan, no base."""
    sizes = {"in_channels": 64, "out_channels": 16, "attention_head_dim": 32, "axes_dims_rope": [4, 14, 14]}
    state = released_state(make_model(num_layers=TEACHER_BLOCKS, **sizes), KEPT, LISTS)
    config = model_config(make_model(num_layers=len(KEPT), **sizes))
    write_folder(models.ppcl / "to_fold", state, config, LISTS, "sharded")
    write_tensors(models.diffusion_models / "single_to_fold.safetensors", state)
    for options in ({}, {"legacy_text": True}, {"preset": "by intervals", "intervals": INTERVALS}):
        for name in ("to_fold/", "single_to_fold.safetensors"):
            expected = drawn(load(name, **options))
            assert torch.equal(drawn(load(name, fold="table", **options)), expected)
            assert 0 < relative_error(drawn(load(name, fold="basis", **options)), expected) < BOUND


def test_nodes_that_show_a_model(load, bundle, teacher, run_node, of_form, switched, plain):
    words = {"table": "folded: a table of ", "basis": "folded: a basis of rank "}
    for form in ("table", "basis"):
        picture, text = run_node("PPCL_Info", model=switched(of_form(form), variant="small"))
        assert picture.shape[2] == 1800 and "4 of 6 blocks run" in text and words[form] in text
        reports = [
            run_node("PPCL_LoraReport", model=m, lora="modulations.safetensors")[0] for m in (of_form(form), plain)
        ]
        assert reports[0] == reports[1] and "covers 14 of 24" in reports[0]
        alone, both = (
            load(bundle.name, base=teacher.name, variant="small", switchable=s, fold=form) for s in (False, True)
        )
        shares = [
            run_node("PPCL_Info", model=m)[1].splitlines()[0].split(" % of")[0].split()[-1] for m in (alone, both)
        ]
        assert abs(int(shares[0]) - int(shares[1])) <= 1  # a table in the host has a bias for LoRA


def test_counted_without_weights(pack):
    """Qwen-Image's real shapes: every tensor of a folded model has a home."""
    import comfy.ops

    from ppcl_engine.architectures import architecture_named
    from ppcl_engine.architectures.folded import Folding
    from ppcl_engine.checkpoint import expected_shapes

    architecture, host = architecture_named("qwen_image"), pack("host.qwen_image").HOST
    building, structure_of = pack("host.building"), pack("host.structure").structure_of
    for form, inputs in (("table", 20), ("basis", 33)):
        config = {**architecture.model_configs["qwen_image"], "folding": Folding(form=form, inputs=inputs).to_config()}
        shapes = expected_shapes(architecture, config)
        tensors = {n: torch.empty(shape, dtype=torch.bfloat16, device="meta") for n, shape in shapes.items()}
        hints = torch.tensor(list(json.dumps({"folding": config["folding"]}).encode()), dtype=torch.uint8)
        tensors["ppcl_hints"] = hints
        model = building.empty_host_model(host, tensors, comfy.ops.disable_weight_init, torch.bfloat16)
        building.check_tensors(model, structure_of(host, tensors).renamed(tensors))
        assert 13.6 < sum(p.numel() for p in model.parameters()) / 1e9 < 13.72
