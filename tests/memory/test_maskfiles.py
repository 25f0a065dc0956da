"""Files of masks: what goes in comes out, and everything else is refused with a sentence."""

from __future__ import annotations

import json
import pickle
import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launched import ended, started
from records import ConvNet, Mlp, every_second, make, record_of, state_of
from safetensors import safe_open
from safetensors.torch import _TYPES, load_file, save_file
from torch import nn
from torchvision.models import vgg16

from lightning_rnf import RelevanceFreezing, UnitLayer, UnitMap
from lightning_rnf.anatomy import form
from lightning_rnf.heads import MultiHead
from lightning_rnf.memory import maskfiles
from lightning_rnf.memory.state import FreezeState
from lightning_rnf.search.cutoff import Evaluation

NAN = float("nan")

WITH_COMPLEX_NUMBERS = [
    ("bn1.running_mean", lambda value: value.to(torch.complex64), "in this model, and was of torch.complex64")
]
if torch.complex64 not in _TYPES.values():  # safetensors 0.4.5 knows none: nobody can write such a file
    WITH_COMPLEX_NUMBERS = []


def two_tasks(net):
    return state_of(net, record_of(net), record_of(net, "second", relevant=every_second(net.layers, 1)))


def saved(tmp_path, kind=ConvNet, **options):
    net = make(kind)
    rnf = RelevanceFreezing()
    rnf.state = two_tasks(net)
    path = tmp_path / "masks.safetensors"
    rnf.save(path, **options)
    return net, rnf, path


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def rewrite(path, tensors=None, **changes):
    """The same file with other tensors or another state in it, and a checksum that is right."""
    old = metadata(path)
    tensors = load_file(path) if tensors is None else tensors
    text = json.dumps({**json.loads(old["lightning_rnf"]), **changes})
    save_file(tensors, path, {"lightning_rnf": text, "sha256": maskfiles.checksum(text, tensors)})


def equal(one, other):
    """Whether two plain states are the same, tensors bit by bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("kind", [Mlp, ConvNet])
def test_what_is_saved_is_loaded(kind, tmp_path):
    net, rnf, path = saved(tmp_path, kind, relevance=True)
    other = RelevanceFreezing()
    other.load(path, net)
    assert equal(other.state.to_plain(), rnf.state.to_plain())
    assert [entry.name for entry in tmp_path.iterdir()] == ["masks.safetensors"]


def test_relevance_is_left_out_unless_it_is_asked_for(tmp_path):
    _, rnf, path = saved(tmp_path)
    found = maskfiles.load(path)
    for name, record in rnf.state.tasks.items():
        assert all(not values.any() for values in found.tasks[name].relevance.values())
        assert all(torch.equal(mask, record.relevant[layer]) for layer, mask in found.tasks[name].relevant.items())


def test_a_loaded_task_is_recalled_bit_for_bit(tmp_path):
    net, rnf, path = saved(tmp_path)
    other = RelevanceFreezing()
    other.load(path)
    x = torch.randn(3, *net.shape)
    with torch.no_grad():
        with rnf.recall("first", net):
            kept = net(x)
        with other.recall("first", net):
            assert torch.equal(net(x), kept)


def test_the_first_of_eight_units_is_in_the_highest_bit(tmp_path):
    _, rnf, path = saved(tmp_path)
    rows = []
    for record in rnf.state.tasks.values():
        bits = "".join(str(int(unit)) for mask in record.relevant.values() for unit in mask)
        rows.append([int(bits[first : first + 8].ljust(8, "0"), 2) for first in range(0, len(bits), 8)])
    assert len(bits) % 8
    assert load_file(path)["masks"].tolist() == rows


def test_ten_tasks_of_a_vgg16_take_less_than_100_kilobytes(tmp_path):
    with torch.device("meta"):
        net = vgg16()
        net.classifier[6] = MultiHead(4096, {f"task-{index}": 10 for index in range(10)})
    layers = [
        (f"{name}.weight", f"{name}.bias", len(part.weight), -3 if isinstance(part, nn.Conv2d) else -1, name)
        for name, part in net.named_modules()
        if isinstance(part, (nn.Conv2d, nn.Linear)) and "6.tasks" not in name
    ]
    units = tuple(UnitLayer(name, size, axis, (weight, bias)) for weight, bias, size, axis, name in layers)
    generator = torch.Generator().manual_seed(0)
    state = FreezeState()
    example = record_of(make(Mlp))
    score = example.evaluations[1].score
    for index in range(10):
        head = f"classifier.6.tasks.task-{index}"
        masks = {layer.name: torch.rand(layer.units, generator=generator) < 0.3 for layer in units}
        cutoffs = range(0, 14 * 37, 37)
        fourteen = tuple(
            Evaluation(replace(score, cutoff=cutoff, accuracy=0.9 - cutoff / 3e3), True) for cutoff in cutoffs
        )
        record = replace(
            example,
            name=f"task-{index}",
            head=head,
            head_parameters=(f"{head}.weight", f"{head}.bias"),
            relevant=masks,
            relevance={layer.name: torch.rand(layer.units, generator=generator) for layer in units},
            evaluations=fourteen,
            norm_statistics={},
            capacity={layer.name: 1 / 3 for layer in units},
            conservation={layer.name: 0.9471234123 for layer in units},
            cuts=tuple(layer.name for layer in units),
            rows={layer.name: "0" * 32 for layer in units} | {head: "f" * 32},
            tests={f"task-{old}": {"test_acc": 0.971234567} for old in range(index + 1)},
        )
        state.add(record, UnitMap(units, head, record.head_parameters, (), (), ()))
    path = tmp_path / "masks.safetensors"
    maskfiles.save(state, path)
    assert sum(layer.units for layer in units) == 12_416
    assert path.stat().st_size < 100_000
    found = maskfiles.load(path)
    assert all(
        torch.equal(mask, found.tasks[name].relevant[layer])
        for name, record in state.tasks.items()
        for layer, mask in record.relevant.items()
    )


def refused(path, tmp_path, model=None):
    """The sentence with which a callback refuses a file, which leaves it as it was."""
    rnf = RelevanceFreezing()
    rnf.state = two_tasks(make(ConvNet))
    before, state = rnf.state.to_plain(), rnf.state
    with pytest.raises(ValueError, match=r".") as error:
        rnf.load(path, model)
    assert rnf.state is state
    assert equal(rnf.state.to_plain(), before)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    return str(error.value)


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path):
    _, _, path = saved(tmp_path)
    whole = path.read_bytes()
    for length in {0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:length])
        assert "holds no masks that can be read" in refused(path, tmp_path)
    path.write_bytes(whole + b"\0")
    refused(path, tmp_path)


def test_a_flipped_bit_anywhere_is_refused(tmp_path):
    _, _, path = saved(tmp_path, relevance=True)
    whole = path.read_bytes()
    places = random.Random(0).sample(range(8 * len(whole)), 200)
    for place in places:
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        refused(path, tmp_path)


def test_a_renamed_pickle_is_refused_and_does_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "masks.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    refused(path, tmp_path)
    torch.save({"state": torch.ones(3)}, path)
    refused(path, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_huge_declared_sizes_are_refused_before_anything_is_allocated(tmp_path):
    _, _, path = saved(tmp_path)
    header = {"masks": {"dtype": "U8", "shape": [1 << 50, 1 << 10], "data_offsets": [0, 1 << 60]}}
    text = json.dumps(header).encode()
    other = tmp_path / "huge.safetensors"
    other.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 16)
    refused(other, tmp_path)
    other.write_bytes(struct.pack("<Q", 1 << 62) + text)
    refused(other, tmp_path)
    layers = json.loads(metadata(path)["lightning_rnf"])["layers"]
    layers[0]["units"] = 1 << 60
    rewrite(path, layers=layers)
    assert "for masks it holds" in refused(path, tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("masks", torch.zeros(2, 1, dtype=torch.uint8)),
        ("masks", torch.zeros(2, 2, dtype=torch.int8)),
        ("masks", torch.zeros(3, 2, dtype=torch.uint8)),
        ("relevance", torch.zeros(2, 8)),
        ("stranger", torch.zeros(1)),
    ],
)
def test_wrong_shapes_dtypes_and_strangers_are_refused(name, tensor, tmp_path):
    _, _, path = saved(tmp_path)
    rewrite(path, {**load_file(path), name: tensor})
    assert name in refused(path, tmp_path)


def test_a_file_of_somebody_elses_or_of_the_future_is_refused(tmp_path):
    _, _, path = saved(tmp_path)
    rewrite(path, version=99)
    assert "version 99" in refused(path, tmp_path)
    rewrite(path, version=1, tasks="none")
    assert "list of tasks" in refused(path, tmp_path)
    save_file({"weight": torch.zeros(2)}, path)
    assert "not written by lightning_rnf" in refused(path, tmp_path)


def changed(path, tmp_path, part, number, model=None, **changes):
    """The sentence for a file whose checksum is right, and in which one layer or task says something else."""
    parts = json.loads(metadata(path)["lightning_rnf"])[part]
    parts[number].update(changes)
    rewrite(path, **{part: parts})
    return refused(path, tmp_path, model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"axis": 0}, "'axis' of 'conv1' is 0"),
        ({"axis": 10**400}, "'axis' of 'conv1' is 1000"),
        ({"axis": -1}, "along dimension -1"),
        ({"norm": "zzz"}, "those of the layer, its norm and its slopes"),
        ({"norm": "heads"}, "those of the layer, its norm and its slopes"),
        ({"slopes": "zzz"}, "had 'zzz' for its slopes when a task ended, in this model that is missing"),
        ({"slopes": "bn1"}, "had 'bn1' for its slopes when a task ended, in this model that is of type BatchNorm2d"),
        ({"parameters": []}, "those of the layer, its norm and its slopes"),
        ({"parameters": ["conv1.weight", "conv2.weight"]}, "those of the layer, its norm and its slopes"),
        ({"parameters": ["conv1.weight", "conv1.weight", "bn1.weight"]}, "'conv1.weight' belongs to two"),
        ({"transposed": [4, 1]}, "was a layer with a transposed weight"),
        ({"transposed": [2, 10**300]}, "'transposed' should be"),
        ({"name": "\x1b[2J", "parameters": ["\x1b[2J.weight"]}, "'name' should be a name"),
    ],
)
def test_a_layer_that_this_model_can_not_have_is_refused(changes, said, tmp_path):
    _, _, path = saved(tmp_path)
    assert said in changed(path, tmp_path, "layers", 0, make(ConvNet), **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": "zzz", "head_parameters": []}, "lacks the module 'zzz', the head of task 'first'"),
        ({"head": ""}, "'head' should be a name"),
        ({"head_parameters": ["conv1.weight"]}, "which is not in its head"),
        ({"rows": {"zzz": "00"}}, "has what it did not freeze"),
        ({"cutoff": 10**400}, "'cutoff' should be a count"),
        ({"cutoff": -1}, "'cutoff' should be a count"),
        ({"samples": -3}, "'samples' should be a count"),
        ({"recovery_epochs": -1}, "'recovery_epochs' should be a count"),
        *(({"accuracy": value}, "'accuracy' should be a share") for value in (NAN, float("inf"), -5.0, 1.5)),
        ({"subnetwork_accuracy": NAN}, "'subnetwork_accuracy' should be a share"),
        ({"capacity": {"conv1": 3.0, "conv2": 0.5}}, "'conv1' should be a share"),
        *(({"name": name}, "'name' should be a name") for name in ("", "\ud800", "\x1b[2J", "a\nb", "\u2028", "\x9b")),
        ({"notes": ["\x07"]}, "'notes' should be names"),
        ({"tests": {"\udfff": {"acc": 1.0}}}, "'tests' should be names"),
    ],
)
def test_a_task_that_can_not_have_been_is_refused(changes, said, tmp_path):
    _, _, path = saved(tmp_path)
    assert said in changed(path, tmp_path, "tasks", 0, make(ConvNet), **changes)


@pytest.mark.parametrize("key", ["accuracy", "cutoff", "free"])
def test_a_score_that_can_not_have_been_measured_is_refused(key, tmp_path):
    _, rnf, path = saved(tmp_path)
    evaluations = rnf.state.to_plain()["tasks"][0]["evaluations"]
    evaluations[1]["score"][key] = NAN if key == "accuracy" else 10**400
    assert f"'{key}' should be" in changed(path, tmp_path, "tasks", 0, evaluations=evaluations)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("bn1.running_mean", lambda value: value * NAN, "has no statistics of relevant units in 'bn1.running_mean'"),
        ("bn1.running_var", lambda value: -value, "has no statistics of relevant units in 'bn1.running_var'"),
        ("bn1.running_mean", lambda value: value.to(torch.int8), "in this model, and was of torch.int8"),
        *WITH_COMPLEX_NUMBERS,
        ("bn1.num_batches_tracked", lambda value: value > 0, "in this model, and was of torch.bool"),
        ("bn1.running_mean", lambda value: value[:2].clone(), "and had (2,)"),
    ],
)
def test_statistics_that_are_none_of_this_model_s_are_refused(name, change, said, tmp_path):
    _, _, path = saved(tmp_path)
    tensors = load_file(path)
    key = f"statistics.1.{name}"
    rewrite(path, {**tensors, key: change(tensors[key])})
    assert said in refused(path, tmp_path, make(ConvNet))


def test_statistics_of_a_parameter_s_name_are_refused(tmp_path):
    _, rnf, path = saved(tmp_path)
    names = [*rnf.state.to_plain()["tasks"][0]["norm_statistics"], "conv1.weight"]
    rewrite(path, {**load_file(path), "statistics.0.conv1.weight": torch.zeros(4, 1, 3, 3)})
    said = changed(path, tmp_path, "tasks", 0, make(ConvNet), norm_statistics=names)
    assert "lacks the buffer 'conv1.weight'" in said


def test_irrelevant_units_may_have_diverged(tmp_path):
    net, _, path = saved(tmp_path)
    tensors = load_file(path)
    tensors["statistics.0.bn1.running_mean"][1] = NAN  # relevant to the first task are 0 and 2
    rewrite(path, tensors)
    other = RelevanceFreezing()
    other.load(path, net)
    with other.recall("first", net), torch.no_grad():
        assert net(torch.randn(3, *net.shape)).isfinite().all()


def test_what_a_file_says_of_itself_reaches_no_terminal_as_it_is(tmp_path):
    _, _, path = saved(tmp_path)
    rewrite(path, {**load_file(path), "\x1b[2J": torch.zeros(1)})
    assert "\x1b" not in refused(path, tmp_path)
    text = json.dumps({"\x1b[2J": {"dtype": "\x1b[2J", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    assert "\x1b" not in refused(path, tmp_path)


MEMORY = """
from lightning_rnf.memory import maskfiles
def peak():  # ru_maxrss would be that of the parent if it is larger
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
maskfiles.load(small)
before = peak()
maskfiles.load(large)
grown.write_text(str((peak() - before) * 1024))
"""


STATUS = Path("/proc/self/status")


@pytest.mark.skipif(not STATUS.exists() or "VmHWM" not in STATUS.read_text(), reason="the system tells no such peak")
def test_a_unit_takes_a_byte_and_no_more(tmp_path):
    _, _, small = saved(tmp_path, Mlp)
    plain = json.loads(metadata(small)["lightning_rnf"])
    units = 2**26
    plain["layers"] = [{**plain["layers"][0], "units": units}]
    for task in plain["tasks"]:
        task["norm_statistics"] = []
    large = tmp_path / "large.safetensors"
    tensors = {"masks": torch.zeros(2, units // 8, dtype=torch.uint8)}
    text = json.dumps(plain)
    save_file(tensors, large, {"lightning_rnf": text, "sha256": maskfiles.checksum(text, tensors)})
    found = tmp_path / "grown"
    assert ended(started(exec, MEMORY, {"small": small, "large": large, "grown": found})) == [0]
    grown = int(found.read_text())
    # A byte a unit and task, the file, and one mask on the way.
    assert 2 * units < grown < 10 * large.stat().st_size + units


def test_a_description_of_any_length_is_not_parsed(tmp_path, monkeypatch):
    _, rnf, path = saved(tmp_path)
    monkeypatch.setattr(maskfiles, "LONGEST_TEXT", 100)
    assert "is longer than 100 characters" in refused(path, tmp_path)
    with pytest.raises(ValueError, match="longer than 100 characters"):
        rnf.save(tmp_path / "other.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["masks.safetensors"]


def test_another_model_is_refused(tmp_path):
    _, _, path = saved(tmp_path)
    assert "conv1" in refused(path, tmp_path, make(Mlp))


def test_a_finished_task_is_not_lost(tmp_path):
    net, rnf, path = saved(tmp_path)
    one = FreezeState()
    one.add(rnf.state.task("first"), net.units("first"))
    maskfiles.save(one, path)
    assert "lacks 'second'" in refused(path, tmp_path)


def test_nothing_to_save_or_to_load(tmp_path):
    rnf = RelevanceFreezing()
    with pytest.raises(ValueError, match="no task has ended"):
        rnf.save(tmp_path / "masks.safetensors")
    with pytest.raises(FileNotFoundError, match="no file of masks"):
        rnf.load(tmp_path / "masks.safetensors")
    assert not list(tmp_path.iterdir())


def test_masks_go_to_the_hub_and_come_back(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    net, rnf, _ = saved(tmp_path)
    there = {}

    class Api:
        def __init__(self, **options):
            pass

        def create_repo(self, repository, *, private, exist_ok):
            there[repository] = {"private": private}
            assert exist_ok

        def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, commit_message):
            there[repo_id][path_in_repo] = Path(path_or_fileobj).read_bytes()
            return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})()

    def download(repository, name, *, revision):
        path = tmp_path / f"from-{revision}"
        path.write_bytes(there[repository][name])
        return str(path)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert rnf.push_to_hub("me/masks", private=True) == "https://hub/me/masks/commit/1"
    assert there["me/masks"]["private"] is True
    found = RelevanceFreezing.from_pretrained("me/masks", revision="v1", model=net, ration=0.5)
    assert list(found.state.tasks) == ["first", "second"]
    assert found.ending.selection.rations == (0.5,)
    with pytest.raises(ValueError, match="conv1"):
        RelevanceFreezing.from_pretrained("me/masks", model=make(Mlp))


def test_the_forms_of_parameters_are_in_the_file(tmp_path):
    state = state_of(make(ConvNet))
    state.forms = {name: form(parameter) for name, parameter in make(ConvNet).named_parameters()}
    maskfiles.save(state, tmp_path / "masks.safetensors")
    assert maskfiles.load(tmp_path / "masks.safetensors").forms == state.forms
