"""What an experiment leaves in its folder, and what it makes of what it finds there."""

import json
import shutil
from dataclasses import replace

import pytest
from experiments import play, without_seconds

from peft_moe_merge.mtil.checkpoint import newest
from peft_moe_merge.mtil.data.suites import load_suite
from peft_moe_merge.mtil.experiment import run_folder
from peft_moe_merge.mtil.results import read_results, write_results
from peft_moe_merge.mtil.settings import renamed_options

# files ---------------------------------------------------------------------------------------------------------------


def test_results_that_lack_something_are_written_anew_as_advised(experiment, tmp_path):
    told = play(experiment(), tmp_path, ("finetune",), seeds=(0, 1))
    path = tmp_path / "results.json"
    for damage in (
        lambda results: results.pop("methods"),
        lambda results: results["methods"]["finetune"][0].pop("seed"),
    ):
        damaged = json.loads(path.read_text())
        damage(damaged)
        path.write_text(json.dumps(damaged))
        for reads in (
            lambda: read_results(path),
            lambda: play(experiment(), tmp_path, ("finetune",), (0, 1), resume=True),
        ):
            with pytest.raises(
                ValueError, match="lacks .*delete it and start the run's command again with `--resume`"
            ):
                reads()
        path.unlink()
        assert play(experiment(), tmp_path, ("finetune",), (0, 1), resume=True) == told  # to the second: nothing ran
        assert read_results(path) == told
    path.write_text('{"suite"')
    with pytest.raises(ValueError, match="is not JSON: .*delete it and start the run's command again with `--resume`"):
        play(experiment(), tmp_path, ("finetune",), (0, 1), resume=True)
    path.unlink()
    assert play(experiment(), tmp_path, ("finetune",), (0, 1), resume=True) == told
    del told["fingerprint"]
    write_results(path, told)
    with pytest.raises(ValueError, match="of another release. Choose another output folder"):
        play(experiment(), tmp_path, seeds=(2,))


def test_only_what_we_wrote_is_ours(experiment, tmp_path):
    straight = play(experiment(), tmp_path / "straight", ("finetune",))
    folder = run_folder(tmp_path / "run", "finetune", 0)
    play(experiment(), tmp_path / "run", ("finetune",), stop_after=1)
    kept = {"after_1_keep": None, "after_2_keep": None, "after_01": None, "after_": None, "notes": None}
    for name in kept:
        shutil.copytree(folder / "after_1", folder / name)
        kept[name] = {path.name: path.read_bytes() for path in (folder / name).iterdir()}
    (folder / "after_thoughts.txt").write_text("mine")
    assert newest(folder) == folder / "after_1"
    resumed = play(experiment(), tmp_path / "run", ("finetune",), resume=True)
    assert without_seconds(resumed) == without_seconds(straight)
    assert {path.name for path in folder.iterdir()} == {*kept, "after_2", "after_thoughts.txt"}
    for name, content in kept.items():
        assert {path.name: path.read_bytes() for path in (folder / name).iterdir()} == content


@pytest.mark.parametrize("what", ["folder", "file", "others"])
def test_what_has_a_checkpoints_name_and_is_none(experiment, tmp_path, what):
    folder = run_folder(tmp_path, "zero_shot", 0)
    folder.mkdir(parents=True)
    stray = folder / "after_2"
    if what == "file":
        stray.write_text("not a folder")
    else:
        stray.mkdir()
        if what == "others":
            (stray / "photo.jpg").write_bytes(b"precious")
    for resume in (False, True):
        with pytest.raises(
            FileExistsError, match=r"after_2' has the name of a checkpoint and is none.*Move or delete it"
        ):
            play(experiment(), tmp_path, resume=resume)
    stray.rename(tmp_path / "elsewhere")  # as advised
    assert play(experiment(), tmp_path)["methods"]["zero_shot"]


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"matrix": 3}', b'{"settings": {}, "merges": []}', b"\xff"])
def test_progress_that_cannot_be_read(experiment, tmp_path, damage):
    play(experiment(), tmp_path, stop_after=1)
    checkpoint = run_folder(tmp_path, "zero_shot", 0) / "after_1"
    (checkpoint / "progress.json").write_bytes(damage)
    with pytest.raises(ValueError, match=r"progress.json' can't be read: .*delete '.*after_1' to do the run anew"):
        play(experiment(), tmp_path, resume=True)
    shutil.rmtree(checkpoint)  # as advised
    assert len(play(experiment(), tmp_path, resume=True)["methods"]["zero_shot"][0]["matrix"]) == 2


def test_a_checkpoint_that_was_renamed(experiment, tmp_path):
    play(experiment(), tmp_path, stop_after=1)
    folder = run_folder(tmp_path, "zero_shot", 0)
    (folder / "after_1").rename(folder / "after_2")
    with pytest.raises(ValueError, match="after_2' tells of 1 tasks.*Delete it to do the run anew"):
        play(experiment(), tmp_path, resume=True)
    shutil.rmtree(folder / "after_2")  # as advised
    assert len(play(experiment(), tmp_path, resume=True)["methods"]["zero_shot"][0]["matrix"]) == 2


def test_content_of_a_task(images):
    """It follows from what is there, not from where or in how many pieces."""
    (birds, tools) = load_suite(str(images), progress=False)
    (again, _) = load_suite(str(images), progress=False)
    assert birds.content == again.content != tools.content
    rows = birds.train.select(range(len(birds.train)))
    assert replace(birds, name="other", train=rows).content == birds.content
    for changed in (
        replace(birds, train=birds.train.select([1, 0, *range(2, 8)])),
        replace(birds, test=birds.test.select(range(4, 8))),
        replace(birds, class_names=("owl", "hen")),
        replace(birds, templates=("a {}.",)),
        replace(birds, train=birds.test, test=birds.train),
    ):
        assert changed.content != birds.content


def test_options_of_earlier_releases_are_understood():
    with pytest.warns(FutureWarning, match="`--merge_router_columns` is now `--merge_routing`"):
        assert renamed_options(["--merge_router_columns", "mean"]) == ["--merge_routing", "mean"]
    with pytest.warns(FutureWarning):
        assert renamed_options(["--merge_router_columns=mean", "--cpu"]) == ["--merge_routing=mean", "--cpu"]
