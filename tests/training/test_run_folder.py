"""The folder of a run: one training at a time, and nothing outside it."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest
import timm
from safetensors.torch import save_file

from ctxenc.__main__ import main
from ctxenc.runs import config, errors
from ctxenc.runs.errors import UserError
from ctxenc.training import checkpoint, console, loop, runner
from ctxenc.training.bad_images import BadImages, BrokenImageError
from tests.training.small_runs import SEGMENT, make_pairs

HOLDER = """
import sys
from contextlib import ExitStack
from pathlib import Path
from ctxenc.training.runner import take_folder
with ExitStack() as held:
    take_folder(Path(sys.argv[1]), None, Path("runs"), held)
    print(flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path / "run"."""
    (tmp_path / "run").mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], **pipes) as process:
        process.stdout.readline()
        yield process
        process.kill()


class TestOneTraining:
    def test_numbers_are_taken_by_one(self, tmp_path, monkeypatch):
        """Of two that see the same numbers the second takes the next one."""
        (tmp_path / "001").mkdir()
        monkeypatch.setattr(type(tmp_path), "glob", lambda *_: [])  # as it was before the other one made 001
        assert runner.new_folder(None, tmp_path) == tmp_path / "002"
        assert runner.new_folder(None, tmp_path) == tmp_path / "003"

    def test_a_held_folder_is_refused_and_a_dead_holder_is_no_obstacle(
        self, refused, finetune, holder, tmp_path, monkeypatch
    ):
        run = tmp_path / "run"
        monkeypatch.setattr(runner, "PATIENCE", 0)
        before = sorted(run.iterdir())
        assert refused("--out", run).endswith(f"{run} is in use by another training")
        assert refused("--out", run, "--resume", "auto").endswith(f"{run} is in use by another training")
        assert sorted(run.iterdir()) == before
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        assert finetune("--out", run, "--epochs", 1)[0] == 0
        assert finetune("--resume", run)[0] == 0  # the first has let go of it

    def test_a_run_that_is_going_on_is_not_resumed(self, refused, finetune, tmp_path, monkeypatch):
        assert finetune("--out", tmp_path / "run", "--epochs", 1)[0] == 0
        monkeypatch.setattr(runner, "PATIENCE", 0)
        with ExitStack() as held:
            runner.take_folder(tmp_path / "run", None, tmp_path, held)
            assert "is in use by another training" in refused("--resume", tmp_path / "run")

    def test_one_that_came_and_went_meanwhile_is_seen(self, tmp_path, monkeypatch):
        """Between the first look at --out and the lock, another training may have finished there."""
        monkeypatch.setattr(runner, "locked", lambda folder: ExitStack())
        monkeypatch.setattr(runner, "new_folder", lambda *_: tmp_path)
        (tmp_path / "config.json").touch()
        with ExitStack() as held, pytest.raises(UserError, match="already holds a run"):
            runner.take_folder(None, tmp_path, tmp_path, held)

    def test_a_file_system_without_locks_is_told(self, tmp_path, monkeypatch, capsys):
        def acquire(*_, **__):
            raise OSError("No locks available")

        monkeypatch.setattr("filelock.FileLock.acquire", acquire)
        with ExitStack() as held:
            assert runner.take_folder(tmp_path, None, tmp_path, held) == tmp_path
        assert "cannot be locked (No locks available)" in capsys.readouterr().err


def contents(folder):
    return {str(path.relative_to(folder)): path.is_dir() or path.read_bytes() for path in folder.rglob("*")}


class TestNothingOutside:
    @pytest.fixture
    def home(self, tmp_path):
        """What a link in a run folder leads to."""
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "file").write_text("dear")
        return tmp_path / "home"

    def test_temporary_files_are_made_through_no_link(self, tmp_path, home, monkeypatch):
        monkeypatch.setattr("secrets.token_hex", lambda length: "0" * 2 * length)
        (tmp_path / ".0000000000000000.tmp.txt").symlink_to(home / "file")
        with pytest.raises(UserError, match="File exists"), config.atomic(tmp_path / "a.txt"):
            pytest.fail("the body ran")
        (tmp_path / ".0000000000000000.tmp.txt").unlink()
        (tmp_path / ".0000000000000000.tmp.txt").symlink_to(home / "new")  # to nowhere yet
        with pytest.raises(UserError, match="File exists"), config.atomic(tmp_path / "a.txt"):
            pytest.fail("the body ran")
        assert contents(home) == {"file": b"dear"}

    def test_their_names_cannot_be_known_and_are_short(self, tmp_path):
        seen = set()
        for _ in range(20):
            with config.atomic(tmp_path / f"{'x' * 240}.mask.png") as path:
                assert runner.UNFINISHED.fullmatch(path.name)
                seen.add(path.name)
        assert len(seen) == 20
        assert not any(str(os.getpid()) in name for name in seen)

    def test_a_file_takes_the_place_of_a_link(self, tmp_path, home):
        (tmp_path / "a.txt").symlink_to(home / "file")
        with config.atomic(tmp_path / "a.txt") as path:
            path.write_text("ours")
        assert not (tmp_path / "a.txt").is_symlink()
        assert contents(home) == {"file": b"dear"}

    def test_the_list_of_bad_images_is_no_link(self, tmp_path, home):
        (tmp_path / "bad_images.txt").symlink_to(home / "file")
        with pytest.raises(UserError, match=r"cannot write .*bad_images\.txt: Too many levels of symbolic links"):
            BadImages(tmp_path / "bad_images.txt", 9).add(BrokenImageError("broken image a.png"))
        assert contents(home) == {"file": b"dear"}

    @pytest.mark.parametrize(
        "name", ["context-0", "context-0/checkpoints", "context-0/pictures", "context-0/tensorboard"]
    )
    @pytest.mark.parametrize("kind", ["link", "file"])
    def test_folders_are_no_links(self, refused, done, tmp_path, home, name, kind):
        run = shutil.copytree(done, tmp_path / "run")
        shutil.rmtree(run / name, ignore_errors=True)
        if kind == "link":
            (run / name).symlink_to(home)
        else:
            (run / name).write_text("")
        assert refused("--resume", run).endswith(f"{run / name} must be a folder, got a {kind}")
        assert contents(home) == {"file": b"dear"}


def test_what_a_kill_leaves_is_swept_on_resume(finetune, done, tmp_path):
    run = shutil.copytree(done, tmp_path / "run")
    token = "0a" * 8
    left = [run / f".{token}.tmp.json", run / "context-0" / f".{token}.tmp.safetensors", run / "se-1" / f".{token}.tmp"]
    left += [run / "context-0" / "pictures" / f".{token}.tmp.png"]
    kept = [run / "context-0" / name for name in (".notes.tmp", ".notes.tmp.txt", f"{token}.tmp", f".{token}.tmp.a b")]
    for path in (*left, *kept):
        path.write_text("half")
    folders = [
        run / "context-1" / "checkpoints" / f".{name}.{token}.tmp" for name in ("epoch-00001-step-0000001", "mine")
    ]
    for path in folders:
        path.mkdir()
        (path / "model.safetensors").touch()
    assert finetune("--resume", run)[0] == 0
    assert not any(path.exists() for path in (*left, folders[0]))
    assert all(path.exists() for path in (*kept, folders[1]))


EVIL = "a\x1b]0;title\x07\x1b[2J\x9b31m\n\u202egpj.png"
SHOWN = r"a\x1b]0;title\x07\x1b[2J\x9b31m\n\u202egpj.png"


class TestNames:
    """Names of files and classes cannot steer a terminal."""

    def test_what_is_escaped(self):
        assert errors.printable(EVIL) == SHOWN
        assert (
            errors.printable("\u96ea \u0627\u0644 caf\u00e9 \U0001f600\u200d.png")
            == "\u96ea \u0627\u0644 caf\u00e9 \U0001f600\u200d.png"
        )
        assert console.text_table([EVIL], [[EVIL]]).splitlines() == [SHOWN, "-" * len(SHOWN), SHOWN]

    def test_where_they_are_printed_and_written(self, tmp_path, capsys, run_folder):
        assert main(["predict", str(run_folder), str(tmp_path / EVIL)]) == 2
        assert capsys.readouterr().err == f"ctxenc: error: no such image, folder or glob: {tmp_path / SHOWN}\n"
        (tmp_path / EVIL).write_text("no image")
        image = next((run_folder.parent.parent).rglob("*.png"))
        shutil.copy(image, tmp_path / f"{EVIL}.png")
        for layout in ((), ("--csv",)):
            assert (
                main(
                    [
                        "predict",
                        str(run_folder),
                        str(tmp_path / EVIL),
                        str(tmp_path / f"{EVIL}.png"),
                        "--skip-broken",
                        *layout,
                    ]
                )
                == 0
            )
            out, err = capsys.readouterr()
            assert f"{tmp_path / SHOWN}.png" in out
            assert f"skipped broken image {tmp_path / SHOWN}: " in err
            assert not errors.CONTROLS.search((out + err).replace("\n", ""))
        BadImages(tmp_path / "bad.txt", 9).add(BrokenImageError(f"broken image {EVIL}"))
        checkpoint.write_rows(tmp_path / "rows.csv", ["name"], [{"name": EVIL}])
        assert (tmp_path / "bad.txt").read_text() == f"broken image {SHOWN}\n"
        assert (tmp_path / "rows.csv").read_text() == f"name\n{SHOWN}\n"


class TestStoredConfigurations:
    """What a configuration does by itself when its run is resumed: it may come from others."""

    @pytest.fixture
    def forged(self, done, tmp_path):
        """A run whose last arm has not begun, with a configuration that asks for more."""

        def forge(**settings):
            run = shutil.copytree(done, tmp_path / "run")
            shutil.rmtree(run / "context-1")
            table = json.loads((run / "config.json").read_text())
            (run / "config.json").write_text(json.dumps(table | {"settings": table["settings"] | settings}))
            return run

        return forge

    @pytest.mark.parametrize(
        ("name", "value", "option"),
        [
            ("pretrained", True, "--pretrained"),
            ("initial_checkpoint", "/etc/some file", "--initial-checkpoint '/etc/some file'"),
        ],
    )
    def test_weights_of_others_are_asked_for(self, forged, monkeypatch, capsys, name, value, option):
        asked = []
        monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: asked.append("pretrained"))
        monkeypatch.setattr("ctxenc.runs.folders.load_initial", lambda *_: asked.append("initial_checkpoint"))
        run = forged(**{name: value})
        assert main(["finetune", "--resume", str(run)]) == 2
        assert capsys.readouterr().err.endswith(
            f"--resume: context-1 has not begun, and its start loads weights: add {option}\n"
        )
        assert not asked
        assert main(["finetune", "--resume", str(run), *shlex.split(option)]) in (
            0,
            2,
        )  # calibration may refuse six images
        assert name in asked

    def test_thousands_of_seeds_are_asked_for(self, forged, capsys):
        run = forged(seeds=100_000)
        assert main(["finetune", "--resume", str(run)]) == 2
        assert capsys.readouterr().err.endswith(
            "--resume: the run has 100000 seeds: add --seeds 100000 to train them\n"
        )
        assert not (run / "context-1").exists()

    def test_what_has_begun_needs_them_no_more(self, finetune, done, tmp_path):
        run = shutil.copytree(done, tmp_path / "run")
        table = json.loads((run / "config.json").read_text())
        table["settings"]["initial_checkpoint"] = "/nowhere"
        (run / "config.json").write_text(json.dumps(table))
        assert finetune("--resume", run)[0] == 0

    def test_segmentation_too(self, tmp_path, capsys):
        arguments = [
            "--data",
            str(make_pairs(tmp_path / "data")),
            *SEGMENT,
            "--epochs",
            "1",
            "--out",
            str(tmp_path / "run"),
        ]
        assert main(["segment", "train", *arguments]) == 0
        shutil.rmtree(tmp_path / "run" / "encnet-0")
        table = json.loads((tmp_path / "run" / "config.json").read_text())
        table["settings"]["pretrained_backbone"] = True
        (tmp_path / "run" / "config.json").write_text(json.dumps(table))
        assert main(["segment", "train", "--resume", str(tmp_path / "run")]) == 2
        assert capsys.readouterr().err.endswith(
            "has not begun, and its start loads weights: add --pretrained-backbone\n"
        )

    def test_no_download(self, forged, monkeypatch, capsys, tmp_path):
        asked = []
        monkeypatch.setattr(
            "urllib.request.urlopen", lambda *_, **__: asked.append(1) or (_ for _ in ()).throw(OSError)
        )
        run = forged(data="cifar10", data_dir=str(tmp_path), download=True)
        assert main(["finetune", "--resume", str(run)]) == 2
        assert "--download fetches it" in capsys.readouterr().err
        assert not asked
        assert main(["finetune", "--resume", str(run), "--download"]) == 2
        assert asked

    def test_arms_are_made_one_after_the_other(self, forged, finetune, monkeypatch):
        """Not a folder for each of many seeds."""
        run, real = forged(seeds=100), loop.Loop.fit

        def fit(made, label):
            if made.seed == 2:
                raise KeyboardInterrupt
            real(made, label)

        monkeypatch.setattr(loop.Loop, "fit", fit)
        assert finetune("--resume", run)[0] == 130
        assert sorted(each.name for each in run.iterdir() if each.is_dir()) == [
            "context-0",
            "context-1",
            "se-0",
            "se-1",
            "se-2",
        ]

    def test_how_to_go_on_names_them(self, finetune, monkeypatch, weights_of_se, tmp_path):
        monkeypatch.setattr(loop.Loop, "fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        code, _, err = finetune("--out", tmp_path / "run", "--initial-checkpoint", weights_of_se, "--init", "random")
        assert code == 130
        assert f"--resume {tmp_path / 'run'} --initial-checkpoint '{weights_of_se}'" in err


@pytest.fixture
def weights_of_se(tmp_path):
    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "an se network.safetensors")
    return tmp_path / "an se network.safetensors"
