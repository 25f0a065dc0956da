"""The experiments on photographs: their streams, networks and short runs on slices of the real data."""

from __future__ import annotations

import pytest
import torch
from test_examples import DATA, has, importable, of, run  # noqa: F401 - fixtures
from torch import nn

pytest.importorskip("torchvision")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*falls short of the criterion:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*no free units are left:UserWarning"),
]
FACES, NETWORK, SAMPLE = "utkface128", "weights", "imagenet1000_sample"


def noise(path, seed, size=40):
    """An image of noise where a data set would have a photograph."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    image = torch.randint(256, (3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, "JPEG")


@has("tinyimagenet200")
def test_imagenet_split_forgets_nothing_on_its_stand_in(run):  # noqa: F811
    options = ["--fast", "--tasks", "2", "--samples", "2000", "--epochs", "3", "--set", "stream.classes=5"]
    options[-1:] = [
        "stream.classes=5",
        "methods.tuned.freezing.criterion=0.2",
        "methods.tuned.freezing.recovery_epochs=1",
    ]
    summary = run("imagenet_split", "--settings", settings("imagenet_split_tiny"), "--method", "tuned", *options)
    one = of(summary, "tuned")
    assert "Tiny-ImageNet" in summary["title"]
    assert "Tiny-ImageNet" in summary["stand_in"]
    assert one["forgetting"] == 0
    # So few images teach it next to nothing: how much of its ration a task claims differs between processors.
    first, second = one["free_capacity"]
    assert 0.65 - 0.01 <= first <= 1
    assert (0.65 - 0.01) * first <= second <= first


@has(FACES, NETWORK)
def test_adience_split_forgets_nothing_on_its_stand_in(run):  # noqa: F811
    options = ["--fast", "--samples", "160", "--epochs", "1", "--set", "methods.exact.freezing.criterion=0.2"]
    summary = run("adience_split", "--settings", settings("adience_split_utkface"), "--method", "exact", *options)
    one = of(summary, "exact")
    assert "UTKFace" in summary["title"]
    assert "for Adience" in summary["stand_in"]
    assert one["tasks"] == ["ages 0 1 2 3", "ages 4 5 6 7"]
    assert one["forgetting"] == 0
    assert one["matrix"][1][0] == one["matrix"][0][0]


@has(FACES, NETWORK, SAMPLE)
def test_imagenet_is_kept_before_the_stand_in_for_adience(run):  # noqa: F811
    options = ["--fast", "--samples", "120", "--epochs", "1", "--method", "naive", "exact", "--set"]
    options += ["methods.exact.freezing.criterion=0.2", "methods.exact.freezing.attribution_samples=20"]
    options += ["training.learning_rate=0.003", "methods.exact.freezing.resolution=50", "stream.imagenet_size=128"]
    summary = run("imagenet_to_adience", "--settings", settings("imagenet_to_adience_utkface"), *options)
    naive, exact = of(summary, "naive"), of(summary, "exact")
    assert "reference data and test at once" in summary["stand_in"]
    assert exact["tasks"] == ["imagenet", "all ages"]
    assert exact["forgetting"] == 0 < naive["forgetting"]
    assert 0.2 < naive["matrix"][0][0] == pytest.approx(exact["reference_accuracy"][0][0], abs=1e-6)
    # Reference data and test are the same images, and recall runs the network that the search has measured.
    assert exact["matrix"][0][0] == exact["matrix"][1][0] == pytest.approx(exact["reference_accuracy"][0][1], abs=1e-6)
    if (DATA / "tinyimagenet200").is_dir():
        assert exact["held_out"][0] == exact["held_out"][1] > 0
        assert naive["held_out"][0] > naive["held_out"][1]


@has(FACES, NETWORK, SAMPLE, "tinyimagenet200")
def test_on_validation_the_first_task_s_other_images_are_not_looked_at(run):  # noqa: F811
    options = ["--fast", "--samples", "40", "--epochs", "1", "--method", "naive", "--on-validation"]
    options += ["--set", "stream.imagenet_size=64"]
    summary = run("imagenet_to_adience", "--settings", settings("imagenet_to_adience_utkface"), *options)
    assert "held_out" not in of(summary, "naive")


def settings(name: str) -> str:
    from test_examples import EXAMPLES

    return str(EXAMPLES / f"{name}.yaml")


# -- data -------------------------------------------------------------------------------------------------------------


def test_adience_is_read_as_its_authors_give_it_by_folds_and_age_groups(tmp_path):
    from adience_split import stream
    from images import Data
    from photographs import adience

    labels = ["(0, 2)", "(4, 6)", "(8, 12)", "(15, 20)", "(25, 32)", "(38, 43)", "(48, 53)", "(60, 100)"]
    ages = [*labels, *labels, *labels, "None", "(38, 48)", "35", "13", "(8, 23)"]
    for fold in range(5):
        lines = ["user_id\toriginal_image\tface_id\tage\tgender\tx"]
        for number, age in enumerate(ages):
            user, image = f"{fold}@N0", f"{number}_o.jpg"
            lines.append(f"{user}\t{image}\t{number}\t{age}\tf\t0")
            noise(
                tmp_path / "adience" / "aligned" / user / f"landmark_aligned_face.{number}.{image}", 100 * fold + number
            )
        (tmp_path / "adience" / f"fold_{fold}_data.txt").write_text("\n".join(lines) + "\n")
    train, test = (adience(Data(tmp_path), is_train) for is_train in (True, False))
    of_fold = [*range(8)] * 3 + [2]  # the year 13 is in one group
    assert train.targets.tolist() == of_fold * 4
    assert test.targets.tolist() == of_fold
    assert not {path.parent.name for path in train.images} & {path.parent.name for path in test.images}
    assert train[0][0].shape == (3, 40, 40)

    how = {"source": "adience", "size": 32, "crop": 28, "validation": 0.25}
    first, second = stream(Data(tmp_path), 0, groups=[[0, 2, 4, 6], [1, 3, 5, 7]], **how)
    assert (first.task, second.task) == ("ages 0 2 4 6", "ages 1 3 5 7")
    assert len(first.train) + len(first.validation) == 52
    assert first.validation[0][0].shape == (3, 28, 28)
    assert first.test[0][0].shape == (10, 3, 28, 28)
    assert torch.equal(first.validation[0][0], first.validation[0][0])  # a centre crop
    shown = [first.train[0][0] for _ in range(8)]
    assert any(not torch.equal(shown[0], other) for other in shown)  # at random
    with pytest.raises(FileNotFoundError, match=r"has 0 files fold_<n>_data\.txt"):
        adience(Data(tmp_path / "elsewhere"), True)


@has(FACES)
def test_faces_are_in_the_age_groups_of_adience():
    from images import Data
    from photographs import AGES, utkface

    photographs = utkface(Data(DATA, samples=100), is_train=False)
    assert photographs.images.shape == (100, 3, 128, 128)
    assert set(photographs.targets.tolist()) == set(range(len(AGES)))


def test_imagenet_is_read_from_folders_as_torchvision_has_them(tmp_path):
    from imagenet_split import stream
    from imagenet_to_adience import known
    from images import Data

    for split, number in (("train", 10), ("val", 7)):
        for name in range(12):
            for image in range(number):
                noise(tmp_path / "imagenet" / split / f"n{name:08}" / f"{image}.JPEG", image)
    tasks = stream(Data(tmp_path), 3, source="imagenet", classes=2)
    assert [task.classes for task in tasks] == [2] * 6
    assert sorted(label for task in tasks for label in task.train.labels) == list(range(12))
    assert [len(part) for part in (tasks[0].train, tasks[0].validation, tasks[0].test)] == [18, 2, 14]
    assert tasks[0].train[0][0].shape == tasks[0].test[0][0].shape == (3, 224, 224)
    assert [*tasks[0].train.labels] != [*stream(Data(tmp_path), 4, source="imagenet", classes=2)[0].train.labels]

    task = known(Data(tmp_path, samples=2), "imagenet", 64)
    assert (len(task.validation), len(task.test)) == (2, 2)
    task = known(Data(tmp_path), "imagenet", 64)
    assert (len(task.validation), len(task.test)) == (12 * 5, 12 * 2)
    assert not set(task.validation.images) & set(task.test.images)
    assert task.validation.targets.bincount().tolist() == [5] * 12
    assert task.validation[0][0].shape == (3, 64, 64)
    with pytest.raises(ValueError, match="expected 'imagenet' or 'one of each class'"):
        known(Data(tmp_path), "imagnet", 64)


def test_training_draws_every_class_with_the_same_probability():
    from adience_split import Resampled
    from photographs import Photographs

    from lightning_rnf.streams import split_by_class

    targets = torch.tensor([5] * 900 + [6] * 60 + [7] * 40)
    data = Photographs(targets.view(-1, 1, 1, 1).to(torch.uint8), targets)
    (task,) = split_by_class(data, data, [[6, 5, 7]], validation=0.1)
    task = Resampled(task.task, 3, task.train, task.validation, task.test)
    torch.manual_seed(0)
    drawn = torch.cat([y for _, y in task.train_dataloader()])
    assert len(drawn) == len(task.train) == 900
    assert (drawn.bincount() / 900 - 1 / 3).abs().max() < 0.05  # three deviations
    x, y = next(iter(task.train_dataloader()))
    assert torch.equal(x.view(-1).long(), torch.tensor([6, 5, 7])[y])


# -- networks ---------------------------------------------------------------------------------------------------------


def test_a_test_image_is_answered_by_the_mean_softmax_of_ten_crops():
    from photographs import ten_crops
    from pretrained import averaged

    image = torch.rand(3, 10, 12, generator=torch.Generator().manual_seed(0))
    crops = ten_crops(image, 8, lambda image: image)
    corners = [image[:, top : top + 8, left : left + 8] for top in (0, 2) for left in (0, 4)]
    by_hand = [*corners, image[:, 1:9, 2:10]]
    by_hand += [crop.flip(-1) for crop in by_hand]
    assert len(crops) == 10
    assert all(any(torch.equal(crop, expected) for crop in crops) for expected in by_hand)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    y = torch.tensor([2])
    logits, same = averaged(net, (crops.unsqueeze(0), y))
    expected = torch.stack([net(crop.unsqueeze(0)).softmax(dim=1) for crop in crops]).mean(dim=0)
    torch.testing.assert_close(logits.exp(), expected)
    assert same is y
    centre = crops[4].unsqueeze(0)
    assert torch.equal(averaged(net, (centre, y))[0], net(centre))
    sure, _ = averaged(nn.Flatten(), (torch.tensor([500.0, 0, 0]).view(1, 1, 3, 1, 1).expand(1, 10, 3, 1, 1), y))
    assert sure.isfinite().all()


@has(NETWORK, SAMPLE)
def test_pretrained_weights_are_torchvisions_and_the_old_head_is_kept_if_it_is_asked_for():
    from images import Data
    from photographs import imagenet_sample, normalised
    from pretrained import Pretrained, load
    from torchvision.models import squeezenet1_0

    path = "weights/squeezenet1_0_imagenet.pt"
    how = {"architecture": "squeezenet1_0", "weights": path, "learning_rate": 1e-4, "weight_decay": 0.0}
    state = torch.load(DATA / path, weights_only=True)
    plain = squeezenet1_0()
    plain.load_state_dict(state)
    kept, new = Pretrained(**how, keep="imagenet"), Pretrained(**how)
    new.heads.add("ages", 8)
    for model in (kept, new):
        load(model, Data(DATA))
        model.eval()
    new.heads.activate("ages")
    photographs = imagenet_sample(Data(DATA, samples=24)).shown(normalised())
    x, y = map(torch.stack, zip(*((image, torch.tensor(label)) for image, label in photographs), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(kept(x), plain.eval()(x), rtol=1e-4, atol=1e-4)
        assert (kept(x).argmax(1) == y).float().mean() > 0.4
        assert new(x).shape == (24, 8)
    assert all(torch.equal(value, state[f"features.{name}"]) for name, value in new.net.features.state_dict().items())
    assert list(new.heads.tasks) == ["ages"]
    for model in (kept, new):
        with pytest.raises(ValueError, match="holds other weights"):
            model.take({name: value for name, value in state.items() if "features.3" not in name})
        with pytest.raises(ValueError, match="holds other weights"):
            model.take({**state, "stranger": torch.zeros(1)})
    with pytest.raises(ValueError, match="holds other weights"):
        kept.take({name: value for name, value in state.items() if "classifier" not in name})


def test_vgg_16_has_its_heads_where_torchvision_has_the_last_layer():
    from pretrained import Pretrained
    from torchvision.models import vgg16

    how = {"architecture": "vgg16", "weights": None, "learning_rate": 1e-4, "weight_decay": 0.01}
    with torch.device("meta"):  # half a gigabyte that nobody looks at
        state = vgg16().state_dict()
        kept, new = Pretrained(**how, keep="imagenet"), Pretrained(**how)
        new.heads.add("ages", 8)
        kept.take(state)
        new.take(state)
    assert kept.heads.tasks["imagenet"].out_features == 1000
    assert new.heads.tasks["ages"].weight.shape == (8, 4096)
    names = {name.replace("classifier.6.tasks.imagenet", "classifier.6") for name in kept.net.state_dict()}
    assert names == set(state)
    with pytest.raises(ValueError, match="architecture is 'vgg17', expected one of vgg16, squeezenet1_0"):
        Pretrained(**{**how, "architecture": "vgg17"})
    optimizer = new.configure_optimizers()
    assert optimizer.defaults["weight_decay"] == 0.01
