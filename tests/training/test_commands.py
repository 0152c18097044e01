import csv
import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torchvision.transforms.functional import normalize, resize, to_tensor

import ctxenc
from ctxenc.__main__ import COMMANDS, build_parser, explain, main
from ctxenc.commands import segment
from ctxenc.runs import folders
from ctxenc.runs.config import write_config
from ctxenc.training import exporting, prediction
from ctxenc.training.data import eval_transform
from tests.training.small_runs import SMALL


def start(*arguments, program=("-m", "ctxenc"), **keywords):
    """A process that runs the command line, with the output as text."""
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for what it runs with &
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | keywords),
    )


@pytest.fixture
def command(capsys):
    """Runs the command line in this process; gives the exit code, stdout and stderr."""

    def run(*arguments):
        code = main([str(each) for each in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(command):
    """Runs a command line that must fail as a mistake of the user; gives the message."""

    def run(*arguments):
        code, out, err = command(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
        assert err.startswith("ctxenc: error: ")
        return err.strip()

    return run


class TestCommandLine:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_help_has_an_example(self, name, capsys):
        with pytest.raises(SystemExit) as caught:
            main([name, "--help"])
        assert caught.value.code == 0
        out = capsys.readouterr().out
        assert "example" in out
        assert f"ctxenc {name} " in out.partition("example")[2]
        assert COMMANDS[name].summary[1:20] in out

    @pytest.mark.parametrize(
        "arguments",
        [
            *("--help", "finetune --lr -1", "segment train --x", "inspect x --num-codes 0"),
            *(f"{name} --help" for name in COMMANDS),
            *(f"segment {name} --help" for name in segment.COMMANDS),
        ],
    )
    def test_help_and_wrong_arguments_need_no_library(self, arguments):
        """Torch alone takes 2 s to import."""
        code = (
            "import sys; from ctxenc.__main__ import main\n"
            "try: main()\n"
            "finally: print({'torch', 'timm', 'numpy', 'torchvision', 'matplotlib', 'accelerate'} & set(sys.modules))"
        )
        command = [sys.executable, "-c", code, *arguments.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.endswith("set()\n")
        assert done.stdout.startswith("usage: ") == ("--help" in arguments) != done.stderr.startswith("ctxenc: error: ")

    @pytest.mark.parametrize(
        "arguments",
        [
            ["nonsense"],
            ["predict"],
            ["inspect", "x", "--num-codes", "0"],
            ["inspect", "x", "--smoothing", "hard"],
            ["inspect", "x", "--smoothing", "-1"],
            ["inspect", "x", "--smoothing", "inf"],
        ],
    )
    def test_usage_errors(self, arguments, refused):
        refused(*arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("predict", "the following arguments are required: RUN, IMAGE (ctxenc predict --help)"),
            ("segment trian", "COMMAND must be one of train, evaluate, predict, got 'trian'; near names: train"),
            ("doctor --dtypes 9", "--dtypes must be one of bf16, fp16, fp32, got '9'"),
            (
                "finetune --sched cosin",
                "--sched must be one of cosine, tanh, poly, step, none, got 'cosin'; near names: cosine",
            ),
            ("finetune --lr -1", "--lr must be greater than 0, got '-1'"),
            ("finetune --lr x", "--lr must be a valid number, got 'x'"),
            ("finetune --epochs 0.5", "--epochs must be a valid integer, got '0.5'"),
            ("finetune --smoothing x", "--smoothing must be 'learned' or 'sampled' or be a valid number, got 'x'"),
            ("finetune x", "unexpected argument x (ctxenc finetune --help)"),
            (
                "finetune --wrokers=2",
                "unknown option --wrokers; near names: --workers, --random-erase, --resume (ctxenc finetune --help)",
            ),
            ("predict a b --csv --json", "argument --json: not allowed with argument --csv"),
        ],
    )
    def test_a_wrong_argument_is_told_on_one_line(self, refused, arguments, message):
        assert refused(*arguments.split()) == f"ctxenc: error: {message}"

    def test_no_command_prints_what_to_do_first(self):
        code = (
            "import sys, ctxenc; before = {*sys.modules}; from ctxenc.__main__ import main; code = main([])\n"
            "assert not {'torch', 'timm', 'torchvision', 'matplotlib'} & ({*sys.modules} - before); sys.exit(code)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("python -m ctxenc ")]
        assert [line.split()[3] for line in lines] == ["segment", "finetune", "inspect", "--help"]
        for line in lines[:3]:
            arguments = shlex.split(line)[3:]
            assert build_parser(arguments[0]).parse_args(arguments).command == arguments[0]

    def test_version(self, capsys):
        with pytest.raises(SystemExit):
            main(["--version"])
        assert capsys.readouterr().out == f"ctxenc {ctxenc.__version__}\n"

    @pytest.mark.parametrize(
        ("package", "arguments"),
        [
            ("timm", ["inspect", "resnet18"]),
            ("matplotlib", ["look", "resnet18"]),
            ("pydantic", ["predict", "--help"]),
        ],
    )
    def test_a_missing_extra_is_named(self, package, arguments):
        code = f"import sys; sys.modules['{package}'] = None; from ctxenc.__main__ import main; sys.exit(main())"
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        extra = "pip install 'ctxenc[train]'"
        assert done.stderr == f"ctxenc: error: {arguments[0]} needs the package {package}: {extra}\n"

    def test_doctor_needs_no_pydantic(self):
        """Its extra, timm, does not bring it."""
        code = (
            "import sys; sys.modules['pydantic'] = None; from ctxenc.__main__ import main; main(['doctor', '--help'])"
        )
        assert (
            "usage: " in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        )

    def test_an_import_error_of_another_kind_is_a_bug(self):
        assert explain(ImportError("cannot import name 'x' from 'timm'", name="timm"), "inspect") == ("", 1)

    def test_a_module_of_ctxenc_that_is_missing_is_a_bug(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ctxenc.commands.inspect", None)
        with pytest.raises(ModuleNotFoundError):
            main(["inspect", "resnet18"])

    def test_ctrl_c(self, command, monkeypatch, run_folder, image_folder):
        def interrupt(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(prediction, "load_run", interrupt)
        assert command("predict", run_folder, image_folder) == (130, "", "ctxenc: interrupted\n")

    def test_ctrl_c_in_a_process(self, run_folder, tmp_path):
        fifo = tmp_path / "image.png"
        os.mkfifo(fifo)
        code = (
            "import sys; from ctxenc.__main__ import main; from ctxenc.training import prediction\n"
            "prediction.open_image = lambda path: open(path).read()\n"  # which itself refuses what is no file
            "sys.exit(main())"
        )
        with start("predict", run_folder, fifo, program=("-c", code)) as process:
            try:
                while process.poll() is None:
                    with suppress(OSError):  # no reader yet
                        os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)  # from here the process waits for bytes
                        break
                    time.sleep(0.05)
                for _ in range(6):  # a signal that comes just before read() does not end it, in any Python program
                    process.send_signal(signal.SIGINT)
                    with suppress(subprocess.TimeoutExpired):
                        out, err = process.communicate(timeout=20)
                        break
            finally:
                process.kill()  # else a failure here leaks into the next test
        assert (process.returncode, out, err) == (130, "", "ctxenc: interrupted\n")

    def test_a_closed_pipe_is_silent(self):
        reader, writer = os.pipe()
        os.close(reader)
        process = start("inspect", "test_efficientnet", stdout=writer)
        os.close(writer)
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 141

    def test_a_traceback_on_demand(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CTXENC_TRACEBACK", "1")
        with pytest.raises(Exception, match="unknown model"):
            main(["inspect", "nonsense"])
        monkeypatch.setattr(folders.Path, "is_dir", forbid)
        with pytest.raises(PermissionError):
            main(["evaluate", str(tmp_path)])


def forbid(path):
    """What looking into another user's folder does, even below root."""
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


class TestPathsThatTheSystemRefuses:
    LONG = "x" * 300  # no file system takes a name of that length

    @pytest.mark.parametrize("name", ["predict", "evaluate", "export"])
    def test_the_run(self, refused, monkeypatch, name, tmp_path):
        more = {"predict": [tmp_path], "evaluate": [], "export": ["--torch-export", tmp_path / "a.pt2"]}[name]
        if name == "predict":
            monkeypatch.setattr(prediction, "find_images", lambda arguments: [])
        assert self.LONG in refused(name, tmp_path / self.LONG, *more)
        real = folders.Path.is_dir
        monkeypatch.setattr(folders.Path, "is_dir", lambda path: forbid(path) if path.name == "run" else real(path))
        message = refused(name, tmp_path / "run", *more)
        assert message == f"ctxenc: error: {tmp_path / 'run'}: Permission denied"
        assert not list(tmp_path.iterdir())

    def test_images_and_data(self, refused, run_folder, tmp_path):
        assert self.LONG in refused("predict", run_folder, tmp_path / self.LONG / "a.png")
        assert self.LONG in refused("evaluate", run_folder, "--data", tmp_path / self.LONG)

    def test_what_finetune_takes(self, refused, image_folder, tmp_path):
        small = ("finetune", *SMALL, "--epochs", 1)
        assert self.LONG in refused(*small, "--data", tmp_path / self.LONG, "--out", tmp_path / "run")
        assert self.LONG in refused(*small, "--resume", tmp_path / self.LONG)
        line = refused(*small, "--data", image_folder, "--out", tmp_path / self.LONG)
        assert line == f"ctxenc: error: --out {tmp_path / self.LONG} cannot be written: File name too long"
        assert not list(tmp_path.iterdir())


class TestRunErrors:
    """What every command that takes a run says of one that it cannot use."""

    @pytest.mark.parametrize("name", ["predict", "evaluate", "export"])
    def test_no_run(self, refused, name, image_folder, tmp_path):
        more = {"predict": [image_folder], "evaluate": [], "export": ["--onnx", tmp_path / "a.onnx"]}[name]
        assert "no run at" in refused(name, tmp_path / "none", *more)
        assert "is no run folder" in refused(name, tmp_path, *more)
        assert not list(tmp_path.iterdir())


class TestPredict:
    def test_json_is_what_the_model_says(self, command, run_folder, image_folder):
        path = image_folder / "val" / "cat" / "0.png"
        code, out, _ = command("predict", run_folder, path, "--json", "--top-k", "2", "--device", "cpu")
        assert code == 0
        [entry] = json.loads(out)
        side = resize(to_tensor(Image.open(path)), 32, interpolation=3, antialias=True).clamp(0, 1)
        assert entry["image"] == str(path)
        loaded = prediction.load_run(run_folder)
        image = eval_transform(loaded.config.data_config)(Image.open(path))
        assert image.shape == (3, 32, 32)
        assert torch.allclose(image, normalize(side, [0.5] * 3, [0.5] * 3)[..., 3:35], atol=0.1)
        with torch.no_grad():
            expected = loaded.model(image[None]).softmax(-1)[0]
        values, indices = expected.sort(descending=True)
        assert [each["class"] for each in entry["classes"]] == [loaded.config.classes[i] for i in indices[:2]]
        assert [each["probability"] for each in entry["classes"]] == pytest.approx(values[:2].tolist(), rel=1e-5)

    def test_csv_and_the_table_hold_the_same(self, command, run_folder, image_folder):
        arguments = ("predict", run_folder, image_folder / "val", "--top-k", "9", "--batch-size", "3")
        rows = list(csv.DictReader(io.StringIO(command(*arguments, "--csv")[1])))
        assert len(rows) == 10 * 3
        assert {row["class"] for row in rows} == {"cat", "dog", "newt"}
        for start in range(0, len(rows), 3):
            group = rows[start : start + 3]
            assert len({row["image"] for row in group}) == 1
            assert [row["rank"] for row in group] == ["1", "2", "3"]
            assert sum(float(row["probability"]) for row in group) == pytest.approx(1, abs=2e-4)
        table = command(*arguments)[1].splitlines()[2:]
        assert [line.split()[-3:] for line in table] == [
            [row["rank"], row["class"], row["probability"]] for row in rows
        ]
        assert [line.split()[0] for line in table[::3]] == [row["image"] for row in rows[::3]]

    def test_probabilities_are_taken_in_fp32(self, run_folder, image_folder):
        loaded = prediction.load_run(run_folder)
        paths = [image_folder / "val" / "cat" / f"{number}.png" for number in range(4)]
        kept = []
        loaded.model.register_forward_hook(lambda _, __, logits: kept.append(logits))
        found = prediction.predict(loaded, paths, top_k=3, batch_size=4, amp="bf16")
        assert kept[0].dtype == torch.bfloat16
        expected = kept[0].float().softmax(1).sort(dim=1, descending=True).values
        assert torch.equal(torch.tensor([each.probabilities for each in found]), expected)

    def test_files_folders_and_globs(self, image_folder):
        cats = image_folder / "val" / "cat"
        assert len(prediction.find_images([str(image_folder)])) == 16
        assert prediction.find_images([str(cats / "*.png"), str(cats / "0.png")]) == sorted(cats.iterdir())
        assert len(prediction.find_images([str(image_folder / "val" / "*")])) == 10
        assert len(prediction.find_images([str(image_folder / "**" / "0.png")])) == 6

    def test_nothing_found(self, refused, run_folder, tmp_path):
        (tmp_path / "notes.txt").touch()
        for argument in (tmp_path / "none.png", tmp_path, tmp_path / "*.png"):
            assert str(argument) in refused("predict", run_folder, argument)

    def test_a_broken_image(self, command, refused, run_folder, image_folder, tmp_path):
        good = image_folder / "val" / "cat" / "0.png"
        text, short = tmp_path / "text.png", tmp_path / "short.png"
        text.write_text("no image")
        short.write_bytes(good.read_bytes()[:-200])
        for broken in (text, short):
            assert f"broken image {broken}" in refused("predict", run_folder, good, broken)
        code, out, err = command("predict", run_folder, text, good, short, "--skip-broken", "--json")
        assert code == 0
        assert [each["image"] for each in json.loads(out)] == [str(good)]
        assert [str(text) in line or str(short) in line for line in err.splitlines()] == [True, True, False]
        assert err.splitlines()[-1] == f"{run_folder / 'context-0'} (arm context, seed 0), best checkpoint"
        code, out, err = command("predict", run_folder, text, "--skip-broken")
        assert (code, out) == (2, "")
        assert "cannot be read" in err

    def test_mixed_precision(self, command, run_folder, image_folder):
        arguments = ("predict", run_folder, image_folder / "val", "--json", "--device", "cpu")
        exact, half = (json.loads(command(*arguments, *more)[1]) for more in ([], ["--amp", "bf16"]))
        assert half != exact
        for one, other in zip(exact, half, strict=True):
            probabilities = [
                {each["class"]: each["probability"] for each in entry["classes"]} for entry in (one, other)
            ]
            assert probabilities[0] == pytest.approx(probabilities[1], abs=0.05)


class TestEvaluate:
    def test_agrees_with_the_model(self, command, run_folder, image_folder, config):
        code, out, _ = command("evaluate", run_folder, "--device", "cpu", "--batch-size", "4")
        assert code == 0
        assert out.startswith(f"{run_folder / 'context-0'} (arm context, seed 0), best checkpoint, on {image_folder}\n")
        model = ctxenc.load(run_folder)
        transform = eval_transform(config.data_config)
        hits = {
            name: [
                config.classes[model(transform(Image.open(path))[None]).argmax()] == name
                for path in (image_folder / "val" / name).iterdir()
            ]
            for name in config.classes
        }
        balanced = sum(sum(each) / len(each) for each in hits.values()) / len(hits)
        top1 = sum(map(sum, hits.values())) / 10
        assert balanced != top1
        values = {cells[0]: cells[1] for line in out.splitlines()[1:] if (cells := re.split(r"\s{2,}", line))}
        assert values["class-balanced accuracy"] == f"{100 * balanced:.2f} %"
        assert values["top-1 accuracy"] == f"{100 * top1:.2f} %"
        assert values["images"] == "10"
        assert values["classes seen"] == "3 of 3"

    def test_another_folder_and_checkpoint(self, command, run_folder, image_folder, tmp_path):
        shutil.copytree(image_folder / "val" / "dog", tmp_path / "dog")
        arguments = ("evaluate", run_folder / "context-1", "--data", tmp_path)
        outs = [command(*arguments, "--checkpoint", each)[1] for each in ("best", "last")]
        losses = [next(line for line in out.splitlines() if "cross entropy" in line) for out in outs]
        assert losses[0] != losses[1]
        assert "classes seen" in outs[0]
        assert "1 of 3" in outs[0]

    def test_mixed_precision_and_workers_change_little(self, command, run_folder):
        losses = []
        for more in ([], ["--workers", "1"], ["--amp", "bf16"]):
            AcceleratorState._reset_state(reset_partial_state=True)
            out = command("evaluate", run_folder, "--device", "cpu", *more)[1]
            losses.append(next(float(line.split()[2]) for line in out.splitlines() if "cross entropy" in line))
        assert losses[1] == losses[0]
        assert losses[2] == pytest.approx(losses[0], rel=0.05)

    def test_data_that_does_not_fit(self, refused, run_folder, image_folder, tmp_path):
        assert str(tmp_path / "none") in refused("evaluate", run_folder, "--data", tmp_path / "none")
        (tmp_path / "wolf").mkdir()
        shutil.copy(image_folder / "val" / "cat" / "0.png", tmp_path / "wolf")
        assert "class wolf" in refused("evaluate", run_folder, "--data", tmp_path)

    def test_a_broken_image(self, refused, run_folder, image_folder, tmp_path):
        (tmp_path / "cat").mkdir()
        (tmp_path / "cat" / "0.png").write_text("no image")
        for workers in (0, 1):
            message = refused("evaluate", run_folder, "--data", tmp_path, "--workers", workers)
            assert message.startswith(f"ctxenc: error: broken image {tmp_path / 'cat' / '0.png'}")

    @pytest.mark.parametrize(("name", "value"), [("data", 3), ("data", None), ("val_fraction", "0.2"), ("seed", True)])
    def test_settings_of_a_wrong_type(self, refused, config, run_folder, tmp_path, name, value):
        write_config(tmp_path, replace(config, settings=config.settings | {name: value}))
        shutil.copy(run_folder / "context-0" / "best.safetensors", tmp_path)
        assert f"settings: {name} must be of type" in refused("evaluate", tmp_path)

    def test_a_device_that_is_not_there(self, refused, run_folder):
        assert "device 'nonsense'" in refused("evaluate", run_folder, "--device", "nonsense")


class TestExport:
    @pytest.mark.parametrize("arm", ["context-0", "se-0"])
    def test_torch_export(self, command, run_folder, tmp_path, arm):
        path = tmp_path / "model.pt2"
        code, out, err = command("export", run_folder / arm, "--torch-export", path, "--image-size", 64)
        assert (code, err) == (0, "")
        assert "for any batch and image size; " in out
        program = torch.export.load(path).module()
        for images in (torch.randn(5, 3, 64, 64), torch.randn(1, 3, 96, 65)):
            with torch.no_grad():
                assert torch.allclose(program(images), ctxenc.load(run_folder / arm)(images), atol=1e-6)
        assert list(tmp_path.iterdir()) == [path]

    def test_onnx(self, command, run_folder, tmp_path):
        onnx = pytest.importorskip("onnx")
        path = tmp_path / "model.onnx"
        code, out, err = command("export", run_folder, "--onnx", path)
        assert (code, err) == (0, "")
        assert "for any batch and image size; " in out
        _, evaluate = exporting.open_onnx(path)
        for images in (torch.randn(5, 3, 32, 32), torch.randn(1, 3, 96, 65)):
            with torch.no_grad():
                assert torch.allclose(evaluate(images), ctxenc.load(run_folder)(images), atol=1e-5)
        metadata = {each.key: json.loads(each.value) for each in onnx.load(path).metadata_props}
        config = prediction.load_run(run_folder).config
        expected = {"classes": config.classes} | {key: list(config.data_config[key]) for key in ("mean", "std")}
        assert {key: metadata[key] for key in expected} == expected
        assert list(tmp_path.iterdir()) == [path]

    def test_a_network_of_one_size_is_exported_at_it(self, monkeypatch, tmp_path):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2)).eval()
        traced = partial(exporting.trace, model, (3, 32, 32))
        text = exporting.write_freest(exporting.write_torch_export, traced, tmp_path / "a.pt2", model)
        assert text.startswith("for any batch of images of 32x32; ")
        assert "A file for any image size failed: " in text
        assert "(images of 1x3x32x32 and 3x3x32x32)" in text

    def test_a_program_that_differs_is_not_written(self, refused, run_folder, tmp_path, monkeypatch):
        pytest.importorskip("onnx")
        trace = exporting.trace
        other = ctxenc.load(run_folder / "context-0", checkpoint="last")
        monkeypatch.setattr(exporting, "trace", lambda model, *more: trace(other, *more))
        for option, name in (("--torch-export", "model.pt2"), ("--onnx", "model.onnx")):
            assert "does not give the model's outputs" in refused("export", run_folder, option, tmp_path / name)
        assert not list(tmp_path.iterdir())

    def test_a_damaged_checkpoint_leaves_no_file(self, refused, run_folder, tmp_path):
        arm, out = tmp_path / "arm", tmp_path / "out"
        arm.mkdir()
        out.mkdir()
        for name in ("config.json", "best.safetensors"):
            (arm / name).write_bytes((run_folder / "context-0" / name).read_bytes())
        weights = (arm / "best.safetensors").read_bytes()
        (arm / "best.safetensors").write_bytes(weights[: len(weights) // 2])
        assert "is damaged" in refused("export", arm, "--torch-export", out / "model.pt2")
        assert not list(out.iterdir())

    def test_errors_before_anything_is_built(self, refused, run_folder, tmp_path, monkeypatch):
        monkeypatch.setattr(exporting, "load_run", lambda *_, **__: pytest.fail("the model was built"))
        assert "--onnx FILE or --torch-export FILE" in refused("export", run_folder)
        assert "must end in .pt2" in refused("export", run_folder, "--torch-export", tmp_path / "model.onnx")
        (tmp_path / "sub").mkdir()
        same = ("--onnx", tmp_path / "a.pt2", "--torch-export", tmp_path / "sub" / ".." / "a.pt2")
        assert "--onnx and --torch-export must name two files" in refused("export", run_folder, *same)
        (tmp_path / "sub").rmdir()
        pytest.importorskip("onnx")
        for folder in (".", "..", tmp_path):
            assert f"cannot write {folder}: Is a directory" in refused("export", run_folder, "--onnx", folder)
        (tmp_path / "file").touch()
        for target in (tmp_path / "none" / "a.pt2", tmp_path / "file" / "a.pt2"):
            assert f"cannot write {target}" in refused("export", run_folder, "--torch-export", target)
        monkeypatch.setitem(sys.modules, "onnx", None)
        assert "pip install 'ctxenc[train,export]'" in refused("export", run_folder, "--onnx", tmp_path / "a.onnx")
        assert [each.name for each in tmp_path.iterdir()] == ["file"]
