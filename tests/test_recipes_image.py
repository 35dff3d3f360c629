"""The image recipe: from scratch and from weights, resume, twins, weights that do not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import sparsetrain
from sparsetrain.cli import app
from sparsetrain.recipes import image
from sparsetrain.recipes.checkpoint import load_checkpoint
from sparsetrain.recipes.errors import InputError
from sparsetrain.recipes.image_data import read_images
from sparsetrain.recipes.image_models import (
    VGG16,
    ResNet18,
    build_network,
    hidden_convolutions,
    load_weights,
    read_weights,
)
from sparsetrain.recipes.progress import Progress
from tiny_images import save_folder, save_idx
from training_kill import Killed, Killer, Recorder, learned


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_idx(tmp_path_factory.mktemp("images") / "idx")


def options(data: Path, out: Path, **changes: Any) -> image.ImageOptions:
    small: dict[str, Any] = {
        "width": 4,
        "steps": 30,
        "batch": 12,
        "algorithm": None,
        "schedule": "cubic:every=3,start=2,stop=18",
        "lr": None,
        "model": None,
        "evaluate_every": 10,
        "checkpoint_every": 7,
        "compare": True,
        "flip": True,
    }
    return image.ImageOptions.with_defaults(**{**small, "data": data, "out": out, **changes})


@pytest.fixture(scope="module")
def scratch(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "scratch"
    return out, image.run(options(data, out), Progress(quiet=True))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense VGG trunk of width 2 for one channel, in the sliced names of a detector."""
    model = VGG16(1, 5, 2)
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = {
        f"module.basenet.slice{1 + int(name.split('.')[1]) // 13}.{name.split('.', 1)[1]}": tensor
        for name, tensor in model.state_dict().items()
        if name.startswith("features.")
    }
    path = tmp_path_factory.mktemp("weights") / "trunk.pth"
    torch.save({**state, "module.upconv.0.weight": torch.ones(3)}, path)
    return path


def transfer(data: Path, out: Path, weights: Path, **changes: Any) -> image.ImageOptions:
    small = {"network": "vgg16", "width": None, "size": 16, "model": weights, "prune_steps": 10}
    return options(data, out, **{**small, "steps": 12, "schedule": "", **changes})


def test_from_scratch_ends_sparse_and_learns(scratch: tuple[Path, dict[str, Any]]) -> None:
    out, report = scratch
    sparse, dense = report["lanes"]["sparse"], report["lanes"]["dense"]
    assert json.loads((out / "report.json").read_text())["lanes"] == report["lanes"]
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    # The same start and batch; sums in another order, since values are no longer (O, I, H, W).
    assert sparse["losses"][0] == pytest.approx(dense["losses"][0], rel=1e-5)
    assert sparse["weight_bytes"] < 0.35 * dense["weight_bytes"]
    assert sparse["optimizer_bytes"] < 0.35 * dense["optimizer_bytes"]
    assert not dense["masked"]
    assert "loss_agreement" not in report
    assert sum(dense["losses"][-5:]) < 0.7 * sum(dense["losses"][:5])
    assert report["run"]["train_images"] == 72
    state = load_checkpoint(out / "checkpoint.pt")["lanes"]["sparse"]
    counts = [v.numel() for k, v in state["model"].items() if k.endswith(".values")]
    momenta = [s["momentum_buffer"].numel() for s in state["optimizer"]["state"].values()]
    assert len(counts) == report["sparsified_layers"] == 19
    assert set(counts) <= set(momenta)
    total = sum(m.weight.numel() for m in hidden_convolutions(ResNet18(1, 3, 4, 12)).values())
    assert sum(counts) == pytest.approx(0.1 * total, abs=19)


def test_saved_model_is_the_trained_one(scratch: tuple[Path, dict[str, Any]]) -> None:
    from safetensors.torch import load_file

    out, _ = scratch
    described = json.loads((out / "model" / "config.json").read_text())
    assert described["classes"] == ["0", "1", "2"]
    model = build_network("resnet18", 1, 3, described["width"], described["height"], 0)
    names = list(hidden_convolutions(model))
    fresh = sparsetrain.sparsify(model, 0.5, include=names)
    fresh.load_state_dict(load_file(out / "model" / "model.safetensors"), strict=True)
    lane = load_checkpoint(out / "checkpoint.pt")["lanes"]["sparse"]["model"]
    for name, tensor in lane.items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


@pytest.mark.parametrize("steps", [3, 9, 18, 29])
def test_resume_from_scratch_is_bitwise_the_same(
    data: Path, tmp_path: Path, scratch: tuple[Path, dict[str, Any]], steps: int
) -> None:
    with pytest.raises(Killed):
        image.run(options(data, tmp_path), Killer(steps))
    recorder = Recorder()
    report = image.run(options(data, tmp_path, resume=True), recorder)
    assert learned(report) == learned(scratch[1])
    phase, done = recorder.starts[0]
    assert phase == "train"
    assert 0 < steps - done <= 7
    ours, whole = (
        load_checkpoint(folder / "checkpoint.pt")["lanes"]["sparse"]["model"]
        for folder in (tmp_path, scratch[0])
    )
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


EXCHANGES = "cosine:drop_fraction=0.4,every=4,stop=26"


@pytest.mark.parametrize(
    ("algorithm", "schedule"),
    [
        ("rigl", EXCHANGES),
        ("set", "constant:every=4,stop=26"),
        ("mest", EXCHANGES),
        ("topkast", EXCHANGES),
        ("acdc", "periodic:warmup=5,dense=5,sparse=5,stop=20"),
    ],
)
def test_every_algorithm_resumes_bitwise(
    data: Path, tmp_path: Path, algorithm: str, schedule: str
) -> None:
    chosen = {"algorithm": algorithm, "schedule": schedule, "compare": False, "sparsity": 0.8}
    whole = image.run(options(data, tmp_path / "a", **chosen), Progress(quiet=True))
    with pytest.raises(Killed):
        image.run(options(data, tmp_path / "b", **chosen), Killer(18))
    report = image.run(options(data, tmp_path / "b", **chosen, resume=True), Progress(quiet=True))
    assert learned(report) == learned(whole)
    assert report["lanes"]["sparse"]["topology"] == whole["lanes"]["sparse"]["topology"]
    assert report["lanes"]["sparse"]["topology"]["sparsity/updates"] > 2
    assert report["lanes"]["sparse"]["topology"]["sparsity/total"] == pytest.approx(0.8, abs=0.01)


def test_an_algorithm_starts_from_the_largest_of_given_weights(
    data: Path, weights: Path, tmp_path: Path
) -> None:
    start = {"algorithm": "set", "schedule": "constant:every=9", "steps": 2, "lr": 1e-9}
    chosen = transfer(data, tmp_path, weights, sparsity=0.5, **start)
    image.run(chosen, Progress(quiet=True))
    state = load_checkpoint(tmp_path / "checkpoint.pt")["lanes"]["sparse"]["model"]
    dense = read_weights(weights)["features.37.weight"]
    values = state["features.37.values"]
    assert values.numel() == pytest.approx(dense.numel() / 2, abs=1)
    assert values.abs().min() >= dense.abs().median() * 0.999


def test_transfer_twins_agree_and_resume(data: Path, weights: Path, tmp_path: Path) -> None:
    report = image.run(transfer(data, tmp_path / "a", weights), Progress(quiet=True))
    assert report["loss_agreement"]["largest_relative_difference"] < 1e-4
    assert report["lanes"]["dense"]["masked"]
    assert report["sparsified_layers"] == 11
    with pytest.raises(Killed):
        image.run(transfer(data, tmp_path / "b", weights), Killer(16))
    again = image.run(transfer(data, tmp_path / "b", weights, resume=True), Progress(quiet=True))
    assert learned(again) == learned(report)


def test_already_pruned_weights_keep_their_zeros(data: Path, tmp_path: Path) -> None:
    model = VGG16(1, 3, 2)
    kept = {}
    for name, layer in hidden_convolutions(model).items():
        with torch.no_grad():
            layer.weight.mul_(torch.rand(layer.weight.shape) < 0.2)
        kept[name] = layer.weight.detach() != 0
    torch.save({"state_dict": model.state_dict()}, tmp_path / "pruned.pt")
    recorder = Recorder()
    chosen = transfer(data, tmp_path / "o", tmp_path / "pruned.pt", sparsity=0.75, compare=False)
    image.run(chosen, recorder)
    assert recorder.starts == [("fine-tune", 0)]
    state = load_checkpoint(tmp_path / "o" / "checkpoint.pt")["lanes"]["sparse"]["model"]
    for name, mask in kept.items():
        dense = state[f"{name}.crow_indices"].diff()
        assert torch.equal(dense.long(), mask.flatten(1).sum(1))


def test_static_from_scratch(data: Path, tmp_path: Path) -> None:
    plain = {"algorithm": "static", "schedule": "", "prune_steps": 0}
    chosen = options(data, tmp_path, epochs=1.0, **plain)
    report = image.run(chosen, Progress(quiet=True))
    assert len(report["lanes"]["sparse"]["losses"]) == 6
    assert report["loss_agreement"]["largest_relative_difference"] < 1e-4


def test_retime_changes_the_step_times_alone(
    data: Path, scratch: tuple[Path, dict[str, Any]]
) -> None:
    out, report = scratch
    before = (out / "checkpoint.pt").read_bytes()
    again = image.run(options(data, out, retime=True), Progress(quiet=True))
    assert (out / "checkpoint.pt").read_bytes() == before
    assert learned(again) == learned(report)
    assert again["timing"]["steps"] == 24
    lane = again["lanes"]["dense"]
    assert lane["training_seconds"] == lane["curve"][-1]["seconds"]
    assert lane["training_seconds"] == pytest.approx(30 * lane["seconds_per_step"])
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(again))
    with pytest.raises(InputError, match=r"sparsity=0\.9, now it is 0\.8"):
        image.run(options(data, out, retime=True, sparsity=0.8), Progress(quiet=True))


def test_retime_of_an_unfinished_run_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        image.run(options(data, tmp_path, retime=True), Progress(quiet=True))
    with pytest.raises(Killed):
        image.run(options(data, tmp_path), Killer(9))
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(InputError, match="has not ended"):
        image.run(options(data, tmp_path, retime=True), Progress(quiet=True))


# ---- parts ---------------------------------------------------------------------------------------


def test_flip_mirrors_some_images_by_seed(data: Path) -> None:
    found = read_images(data)
    plain = image.ImageTask(found, list(range(72)), list(range(72, 96)), flip=False)
    flipping = image.ImageTask(found, list(range(72)), list(range(72, 96)), flip=True)
    numbers = torch.arange(40)

    def images(task: image.ImageTask, seed: int) -> Tensor:
        return task.batch(numbers, torch.Generator().manual_seed(seed))[0]["x"]

    same = (images(plain, 1) == images(flipping, 1)).flatten(1).all(1)
    mirrored = (images(plain, 1).flip(-1) == images(flipping, 1)).flatten(1).all(1)
    assert bool((same | mirrored).all())
    assert 5 < int(mirrored.sum()) < 35
    assert torch.equal(images(flipping, 1), images(flipping, 1))
    assert not torch.equal(images(flipping, 1), images(flipping, 2))
    everything = plain.batch(torch.arange(72), torch.Generator())[0]["x"]
    assert everything.mean().item() == pytest.approx(0, abs=1e-4)
    assert everything.std().item() == pytest.approx(1, abs=1e-3)


def test_resnet_has_the_usual_names_and_stems() -> None:
    small, large = ResNet18(3, 10, 8, 32), ResNet18(3, 10, 8, 224)
    assert small.conv1.weight.shape == (8, 3, 3, 3)
    assert large.conv1.weight.shape == (8, 3, 7, 7)
    names = set(large.state_dict())
    assert {"layer1.0.conv1.weight", "layer4.1.bn2.bias", "layer2.0.downsample.0.weight"} <= names
    assert large(torch.randn(2, 3, 96, 96)).shape == (2, 10)
    assert small(torch.randn(2, 3, 32, 20)).shape == (2, 10)


def test_weights_are_loaded_whole_or_not_at_all(tmp_path: Path) -> None:
    source, model = ResNet18(1, 7, 4, 12), build_network("resnet18", 1, 3, 4, 12, seed=1)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    before = model.fc.weight.clone()
    assert load_weights(model, read_weights(tmp_path / "w.pt"), tmp_path / "w.pt") == []
    assert torch.equal(model.layer3[0].conv2.weight, source.layer3[0].conv2.weight)
    assert torch.equal(model.fc.weight, before)  # of another shape in the file
    state = {k: v.clone() for k, v in model.state_dict().items()}
    bad = {**read_weights(tmp_path / "w.pt"), "layer2.0.conv1.weight": torch.ones(8, 3, 3, 3)}
    with pytest.raises(InputError, match=r"layer2.0.conv1.weight .*\(8, 3, 3, 3\).*\(8, 4, 3, 3\)"):
        load_weights(model, bad, tmp_path / "w.pt")
    del bad["layer2.0.conv1.weight"]
    with pytest.raises(InputError, match=r"has no layer2\.0\.conv1\.weight"):
        load_weights(model, bad, tmp_path / "w.pt")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


# ---- bad input -----------------------------------------------------------------------------------


def fails(*arguments: object) -> str:
    """Run the command, expect exit code 2 and one line on standard error."""
    result = CliRunner().invoke(app, ["train", "image", *(str(a) for a in arguments)])
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def saved(folder: Path, content: object) -> Path:
    path = folder / "weights.pt"
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--network", "alexnet"], "network: got 'alexnet', expected resnet18 or vgg16"),
        (["--algorithm", "magic"], "algorithm: got 'magic', expected static or gmp or rigl"),
        (["--schedule", "cosine"], "got 'cosine', gmp takes cubic, for example cubic:every"),
        (["--algorithm", "rigl", "--schedule", "cubic"], "rigl takes constant or cosine"),
        (["--algorithm", "static", "--schedule", "cubic"], "static keeps its pattern"),
        (["--schedule", "cubic:evry=3"], "cubic has no 'evry', but every, stop, start"),
        (["--schedule", "cubic:every=x"], "schedule: every: got 'x', expected a number"),
        (["--schedule", "cubic:start=9,stop=5"], "stop = 5 must come after start = 9"),
        (["--schedule", "cubic:every=0"], "schedule: every must be"),
        (["--steps", 1], "steps: got 1, gmp takes at least 2"),
        (["--sparsity", 0.999, "--width", 2], "algorithm: gmp: sparsity = 0.999 rounds to no"),
        (["--width", 0], "width: got 0"),
        (["--size", -3], "size: got -3"),
        (["--sparsity", 1.0], "sparsity: got 1.0"),
        (["--size", 4], "4x4 pixels are too small for resnet18, which takes 8x8"),
        (["--network", "vgg16", "--size", 15], "too small for vgg16, which takes 16x16"),
        (["--model", "no.pt"], "no.pt is no file"),
        (["--retime"], "holds no run"),
        (["--retime", "--resume"], "exclude each other"),
    ],
)
def test_bad_option(data: Path, tmp_path: Path, arguments: list[object], named: str) -> None:
    line = fails("--data", data, "--out", tmp_path / "out", *arguments)
    assert named in line
    assert not (tmp_path / "out").exists()


def test_bad_weights(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refused(path: Path, *more: object, images: Path = data) -> str:
        line = fails("--data", images, "--out", out, "--model", path, *more)
        assert not out.exists()
        return line

    assert "holds no tensors" in refused(saved(tmp_path, {"a": 1}))
    assert "holds a list" in refused(saved(tmp_path, [1]))
    assert "is no resnet18: it has no convolution conv1.weight; its names begin with x" in refused(
        saved(tmp_path, {"x": torch.ones(2)})
    )
    path = saved(tmp_path, ResNet18(1, 3, 4, 12).state_dict())
    assert "holds a network of width 4" in refused(path, "--width", 8)
    assert "is no vgg16" in refused(path, "--network", "vgg16", "--size", 16)
    assert "conv1.weight" in refused(path, "--size", 96)  # another stem
    coloured = save_folder(tmp_path / "coloured", colour=True)
    line = refused(path, images=coloured)
    assert "the images have 3 channel(s), but the first convolution in" in line
    assert line.endswith("takes 1")
    path.write_bytes(b"no weights")
    assert "cannot load" in refused(path)


def test_weights_that_would_run_code_are_refused(data: Path, tmp_path: Path) -> None:
    path = saved(tmp_path, {"conv1.weight": Payload()})
    line = fails("--data", data, "--out", tmp_path / "out", "--model", path)
    assert "cannot load" in line
    assert not (tmp_path / "ran").exists()


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("ran",)


def test_grey_images_are_repeated_for_three_channels(data: Path, tmp_path: Path) -> None:
    path = saved(tmp_path, ResNet18(3, 3, 4, 12).state_dict())
    chosen = options(data, tmp_path / "o", model=path, width=None, schedule="", steps=2)
    report = image.run(chosen, Progress(quiet=True))
    assert report["run"]["width"] == 4
    assert json.loads((tmp_path / "o/model/config.json").read_text())["channels"] == 3


def test_skipped_images_are_counted_in_the_report(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "d", count=4)
    (folder / "down" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    arguments = ["--data", folder, "--out", tmp_path / "out", "--width", 2, "--steps", 2]
    assert "torn.png cannot be decoded" in fails(*arguments)
    assert not (tmp_path / "out").exists()
    words = ["train", "image", *arguments, "--skip-bad", "--json"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["run"]["skipped_images"] == ["down/torn.png"]
    assert report["run"]["train_images"] == 9
