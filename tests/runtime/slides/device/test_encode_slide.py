"""`encode_chosen` with a tile encoder on a device: what it makes is what the CPU's path makes, by the same policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

torch = pytest.importorskip("torch", reason="the export extra is not installed")

from wsi_rt.export.models import reference_model  # noqa: E402
from wsi_rt.export.sources.presets import NANO  # noqa: E402
from wsi_rt.export.sources.synthetic import SyntheticSource  # noqa: E402
from wsi_rt.runtime import encode_slide  # noqa: E402
from wsi_rt.runtime.config import SlideSettings  # noqa: E402
from wsi_rt.runtime.encode import Encoded  # noqa: E402
from wsi_rt.runtime.encode_slide import choose_tiles, encode_chosen  # noqa: E402
from wsi_rt.runtime.engines.base import Engine  # noqa: E402
from wsi_rt.runtime.errors import InputError, SlideError  # noqa: E402
from wsi_rt.runtime.manifest import EngineManifest, TensorSpec  # noqa: E402
from wsi_rt.runtime.plan import RunPlan  # noqa: E402
from wsi_rt.runtime.slides.device import on_device, refuse_gpu_reader  # noqa: E402
from wsi_rt.runtime.slides.synth import write_synth_slide  # noqa: E402
from wsi_rt.runtime.timing import Stopwatch  # noqa: E402

VIT = NANO.tile_encoder
Make = Callable[..., Any]


class TorchCpu(Engine):
    """The nano tile encoder in plain torch, as any engine, and (`device` says where it claims to be) on a device."""

    def __init__(self, device: str = "cpu") -> None:
        manifest = EngineManifest(
            name="tile_encoder",
            config={"image_px": VIT.image_px, "mean": VIT.mean, "std": VIT.std},
            inputs=(TensorSpec("tiles", "uint8", ("batch", 256, 256, 3)),),
            outputs=(TensorSpec("features", "float32", ("batch", VIT.width)),),
            profile={"batch": (1, 32, 256)},
            portable={},
            portable_parity={},
            rounding={},
            check="",
            targets={},
            weights="weights",
            digest="digest",
        )
        super().__init__(manifest, "fp32")
        self.device, self.dtype = torch.device(device), torch.float32
        self._model = reference_model(VIT, SyntheticSource(VIT, "test", 1))
        self.spoil: int | None = None  # a call on the device whose second row will be NaN

    def _run(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            features = self._model(torch.from_numpy(inputs["tiles"])).numpy()
        if outputs:
            outputs["features"][...] = features
        return {"features": features}

    def prepare_device(self, rows: Sequence[int]) -> None:
        self.calls = 0

    def run_device(self, batch: Any) -> Any:
        with torch.no_grad():
            features = self._model.features(batch)
        if self.calls == self.spoil:
            features[1] = float("nan")
        self.calls += 1
        return features

    def close(self) -> None:
        pass


@pytest.fixture
def encode(stand_in: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Encoded]:
    """encode(path, device, wider=..., engine=..., **settings): "cuda" is the stand-in."""

    def run(path: Path, device: str, *, wider: Any = None, engine: Any = None, **settings: Any) -> Encoded:
        monkeypatch.setattr(encode_slide, "open_device", lambda _: stand_in(seed=5))
        chosen_by = SlideSettings(**settings)
        with choose_tiles(path, chosen_by, 2, Stopwatch(), lambda *_: None) as chosen:
            seen: list[tuple[str, int, int]] = []
            encoded = encode_chosen(
                chosen, engine or TorchCpu(device), 2, Stopwatch(), lambda *at: seen.append(at), RunPlan(5), wider
            )
        assert seen == [("tile encoder", done, 12) for done in (5, 10, 12)]
        return encoded

    return run


@pytest.fixture
def slide(tmp_path: Path) -> Callable[..., Path]:
    """slide(5, 11): 4 x 3 tiles, these of them zeroed in the file."""

    def make(*bad: int) -> Path:
        path = tmp_path / "slide.svs"
        write_synth_slide(path, width=1024, height=768, levels=(1, 16), tissue=0.9, seed=2)
        with tifffile.TiffFile(path) as tiff:
            places = [(tiff.pages[0].dataoffsets[i], tiff.pages[0].databytecounts[i]) for i in bad]
        with path.open("r+b") as file:
            for offset, count in places:
                file.seek(offset)
                file.write(bytes(count))
        return path

    return make


def features(encoded: Encoded) -> np.ndarray:
    assert encoded.features is not None
    return encoded.features.x


def test_the_same_as_on_the_cpu(slide: Make, encode: Make) -> None:
    path = slide()
    host, device = encode(path, "cpu"), encode(path, "cuda")
    np.testing.assert_allclose(features(device), features(host), atol=1e-5)
    assert device.features.provenance.settings["device"] == {
        "name": "stand-in", "tiles": "2 threads of the CPU, into pinned memory", "slots": 3, "batch": 5,
    }  # fmt: skip
    assert "device" not in host.features.provenance.settings
    assert (device.tiles, device.notes) == (host.tiles, host.notes)
    assert device.grid is not None
    assert host.grid is not None
    np.testing.assert_array_equal(device.grid.xy0, host.grid.xy0)


def test_the_torch_targets_engine(
    slide: Make, encode: Make, nano_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real engine, on the CPU: what it gives for tiles on its device is what it gives for arrays."""
    from wsi_rt.runtime.bundle import Bundle
    from wsi_rt.runtime.engines.torch_engine import TorchEngine

    manifest = Bundle.open(nano_bundle).component("tile_encoder")
    path, opened = slide(), manifest.compiled("ort-cpu")
    with TorchEngine.open(nano_bundle, manifest, opened, 1, torch.device("cpu")) as engine:
        assert not on_device(engine)
        host = encode(path, "cpu", engine=engine)
        monkeypatch.setattr(encode_slide, "on_device", lambda _: True)
        device = encode(path, "cuda", engine=engine)
    np.testing.assert_array_equal(features(device), features(host))


@pytest.mark.parametrize("policy", ["skip", "white"])
def test_bad_tiles_by_policy(slide: Make, encode: Make, policy: str) -> None:
    path = slide(5, 11)
    host, device = (encode(path, where, on_bad_tile=policy) for where in ("cpu", "cuda"))
    assert len(features(host)) == (10 if policy == "skip" else 12)
    np.testing.assert_allclose(features(device), features(host), atol=1e-5)
    assert device.failures == host.failures
    assert [f.index for f in device.failures] == [5, 11]
    assert (device.tiles, device.notes) == (host.tiles, host.notes)


def test_a_bad_tile_stops_by_default(slide: Make, stand_in: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    device = stand_in()
    monkeypatch.setattr(encode_slide, "open_device", lambda _: device)
    with (
        choose_tiles(slide(5), SlideSettings(), 2, Stopwatch(), lambda *_: None) as chosen,
        pytest.raises(SlideError, match=r"tile 5 at level-0 position \(256, 256\).* of 12 tiles"),
    ):
        encode_chosen(chosen, TorchCpu("cuda"), 2, Stopwatch(), lambda *_: None, RunPlan(5))
    assert not any(thread.is_alive() for thread in device._threads)  # closed
    assert len(device.done) == len(device.issued)


def test_features_that_are_not_finite_are_made_again_from_the_slide(slide: Make, encode: Make) -> None:
    path, engine = slide(), TorchCpu("cuda")
    wanted = features(encode(path, "cpu"))
    engine.spoil = 1  # tile 6
    encoded = encode(path, "cuda", engine=engine, wider=TorchCpu)
    np.testing.assert_allclose(features(encoded), wanted, atol=1e-5)
    assert encoded.features.provenance.settings["retried_tiles"] == {"count": 1, "xy0": [[512, 256]]}


def test_a_gpu_reader_needs_an_encoder_on_a_gpu(slide: Make) -> None:
    assert not on_device(TorchCpu("cpu"))
    assert on_device(TorchCpu("cuda"))
    refuse_gpu_reader("cucim-cuda", TorchCpu("cuda"))
    refuse_gpu_reader("cucim", TorchCpu("cpu"))
    with pytest.raises(InputError, match="--reader is cucim-cuda, which decodes on the GPU, but the tile encoder"):
        refuse_gpu_reader("cucim-cuda", TorchCpu("cpu"))
