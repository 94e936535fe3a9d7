"""What only happens on a GPU while a host samples; the host itself runs on the CPU here."""

from types import SimpleNamespace

import comfy.model_sampling
import comfy.samplers
import pytest
import torch

from ppcl_engine.settings.prune_settings import ProbeConfig


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_finding_timesteps_leaves_the_devices_random_numbers_alone(pack, device):
    sampling = comfy.model_sampling.ModelSamplingDiscreteFlow()
    patcher = SimpleNamespace(model=SimpleNamespace(model_sampling=sampling))
    sampler = comfy.samplers.ksampler("dpmpp_2s_ancestral")
    sigmas, before = torch.linspace(1, 0, 5, device=device), random_state(device)
    asked = torch.cat(pack("sampling.timesteps").between(patcher, sampler, sigmas))
    assert torch.equal(random_state(device), before)
    assert asked.device.type == device and set(sigmas[:-1].tolist()) <= set(asked.tolist())


def random_state(device: str) -> torch.Tensor:
    return torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()


@pytest.mark.gpu
def test_a_step_takes_until_the_gpu_is_done(pack):
    timer = pack("sampling.step_timer")

    class Patcher:
        pass

    class Step:
        class_obj = SimpleNamespace(model_patcher=Patcher())

        def __call__(self, x):
            for _ in range(50):
                x = x @ x
            return x

    x = torch.full((4096, 4096), 1 / 4096, device="cuda")
    timer._timed_step(Step(), x)
    assert torch.cuda.current_stream().query()
    assert timer.seconds_a_step(Step.class_obj.model_patcher) > 0


@pytest.mark.gpu
def test_a_job_can_name_every_gpu(pack):
    device, *_ = pack("make.base").common_inputs(False, False, False, ProbeConfig)
    count = torch.cuda.device_count()
    assert device.options[2:] == [f"cuda:{number}" for number in range(count)]
