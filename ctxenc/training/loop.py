"""The training loop of all commands: steps and epochs under Accelerate; it can stop at any step and resume."""

import math
import multiprocessing
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from traceback import clear_frames
from typing import Any, ClassVar

import torch
from accelerate import skip_first_batches
from accelerate.utils import gather_object, set_seed
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ctxenc.runs.errors import UserError, one_line
from ctxenc.runs.folders import SCORE
from ctxenc.training import pictures, signals
from ctxenc.training.checkpoint import (
    PREDICTIONS,
    Progress,
    State,
    load_state,
    newest_state,
    publish,
    publish_again,
    save_state,
)
from ctxenc.training.codebooks import codebook_health, draw_codebooks
from ctxenc.training.console import say
from ctxenc.training.nonfinite import Before, first_nonfinite, nonfinite_gradients
from ctxenc.training.processes import make_accelerator
from ctxenc.training.settings import TrainingSettings
from ctxenc.training.tensorboard import epoch_values, log_curves

NAMED = 16  # limit for the images listed in an error


def make_optimizer(parameters: Any, settings: TrainingSettings, **more: Any) -> Optimizer:
    """Build timm's optimiser of `settings` for `parameters`: a network, or groups of parameters.

    Raises:
        UserError: It needs a missing package, or rejects these settings.
    """
    try:
        optimizer = create_optimizer_v2(
            parameters, settings.opt, lr=settings.lr, weight_decay=settings.weight_decay, **more
        )
    except Exception as error:  # each optimiser raises its own
        raise UserError(f"--opt {settings.opt}: {one_line(error)}") from error
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"--opt must do with first derivatives, got {settings.opt}")
    return optimizer


def to_format(images: Tensor, channels_last: bool) -> Tensor:
    """Return `images` in the memory format of the network."""
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images


@contextmanager
def worker_errors() -> Iterator[None]:
    """Strip the traceback from the text of a loader worker's error, and end the workers.

    A killed worker becomes a UserError too.

    The error and its frames form a cycle with the loader. The garbage collector may delete the loader's queues first. The
    workers then never hear that they should end, and the process waits for them at its exit. So break the cycle here.
    """
    try:
        yield
    except BaseException as error:
        clear_frames(error.__traceback__)
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
            hint = "where memory runs out, take fewer --workers, or a smaller --batch-size"
            raise UserError(f"a process that loads images was ended: {one_line(error)}; {hint}") from error
        if not isinstance(error, UserError):
            raise
        _, _, text = str(error).strip().rpartition(f"{type(error).__name__}: ")
        raise UserError(text) from error


class Loop(ABC):
    """Train one arm with one seed. A subclass sets `samples` to train on and `val` to evaluate on, then calls this constructor.

    Order matters: put the network into its memory format and on its device, copy it for the moving average, pass it to the
    optimiser, then wrap it.

    Args:
        settings: The training settings.
        arm: The folder to write to; training resumes from the newest checkpoint in it, if there is one.
        seed: Seed of the weights and of all random draws.
    """

    score: ClassVar[str] = SCORE  # the column of metrics.csv that chooses the best epoch
    score_label: ClassVar[str] = "accuracy"
    predicted: ClassVar[tuple[str, ...]] = PREDICTIONS  # the columns of predictions.csv
    config: Any  # the arm's configuration; it names the classes
    poly_power: float = 0.9
    ema_decay: float | None = None  # decay of a moving average of the weights
    sync_bn: ClassVar[bool] = False  # default if --sync-bn is not given
    network: Any
    samples: Any
    val: Any  # the samples to evaluate on
    val_batch: int | None = None  # batch size for evaluation if it differs: 1 for images of different sizes
    ema: ModelEmaV3 | None = None

    def __init__(self, settings: Any, arm: Path, seed: int) -> None:
        self.settings, self.arm, self.seed = settings, arm, seed
        self.accelerator = make_accelerator(settings, seed, arm)
        self.record = signals.SignalRecord()
        checkpoint = newest_state(self.accelerator, arm)
        set_seed(seed)
        with self.accelerator.local_main_process_first():
            network = self.synchronized(self.build(fresh=checkpoint is None))
        if settings.channels_last:
            network = network.to(memory_format=torch.channels_last)
        self.network = network.to(self.accelerator.device)
        if self.ema_decay is not None:
            self.ema = ModelEmaV3(self.network, self.ema_decay, use_warmup=True)
        optimizer = self.make_optimizer()
        self.model, self.optimizer, self.train_loader = self.accelerator.prepare(
            self.network, optimizer, self.loader(self.samples, train=True)
        )
        self.updates_per_epoch = len(self.train_loader)
        self.scheduler, _ = create_scheduler_v2(
            optimizer,
            settings.sched,
            num_epochs=settings.epochs,
            warmup_epochs=settings.warmup_epochs,
            warmup_lr=settings.lr / 100,
            decay_epochs=settings.epochs / 3,
            decay_rate=self.poly_power if settings.sched == "poly" else 0.1,
            step_on_epochs=False,
            updates_per_epoch=self.updates_per_epoch,
        )
        self.before = Before(self.network, self.accelerator.device)
        averaged = {} if self.ema is None else {"ema": self.ema.module}
        loss = torch.zeros((), device=self.accelerator.device)
        self.state = State({"model": self.network, **averaged}, self.optimizer, loss)
        set_seed(seed, device_specific=True)  # the network's random draws differ between processes
        self.progress = Progress(score=self.score)
        if checkpoint is not None:
            steps, samples, classes = self.updates_per_epoch, len(self.val), len(self.config.classes)
            limits = (self.score, settings.epochs, steps, self.predicted, samples, classes)
            self.progress = load_state(self.accelerator, checkpoint, self.state, limits)
        if self.accelerator.is_main_process:
            publish_again(arm, self.progress, self.evaluated, checkpoint, self.predicted)

    @abstractmethod
    def build(self, fresh: bool) -> nn.Module:
        """Build the network; load its requested pretrained weights if training begins `fresh`."""

    @abstractmethod
    def make_optimizer(self) -> Optimizer:
        """Build the optimiser of `self.network`."""

    @abstractmethod
    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a batch."""

    def synchronized(self, network: nn.Module) -> nn.Module:
        """Return `network`; if requested, on several GPUs, with batch norms over the images of all processes."""
        wanted = self.sync_bn if self.settings.sync_bn is None else self.settings.sync_bn
        if not wanted or self.accelerator.num_processes == 1 or self.accelerator.device.type != "cuda":
            return network
        return convert_sync_batchnorm(network)  # timm's, which keeps the activation of its fused norms

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the network's input and targets for the batch of step `self.progress.step`."""
        return images, targets

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Return the measures of an epoch, the columns of metrics.csv; may set the predictions of `self.progress`."""

    def publish(self) -> None:
        """Write an epoch's results for other commands; on the main process."""
        publish(self.arm, self.progress, self.evaluated, self.predicted)
        self.accelerator.log(epoch_values(self.progress), step=self.progress.epoch * self.updates_per_epoch)

    def finish(self) -> None:
        """Draw pictures of the trained network's results; on the main process, after the last epoch."""
        if self.progress.codebooks:
            pictures.save(self.arm, pictures.CODEBOOKS, draw_codebooks(self.progress.codebooks))

    def codebooks(self) -> list[dict[str, Any]]:
        """Measure the codebooks of the evaluated network."""
        size = self.val_batch or self.settings.batch_size
        return codebook_health(self.accelerator, self.evaluated, self.val, size, self.settings.channels_last)

    @property
    def evaluated(self) -> nn.Module:
        """Return the network to evaluate and save: the moving average if there is one."""
        return self.network if self.ema is None else self.ema.module

    def loader(self, samples: Dataset[Any], train: bool, batch_size: int | None = None) -> DataLoader:
        """Build a loader of `samples`, in random order for training."""
        count, size = len(samples), batch_size or self.settings.batch_size  # type: ignore[arg-type]
        full_batch = count >= self.settings.batch_size * self.accelerator.num_processes
        workers = min(self.settings.workers, -(-count // size))
        # Threads of gloo and NCCL run in these processes; a fork while one of them holds a lock may hang.
        together = workers > 0 and self.accelerator.num_processes > 1
        apart = together and "forkserver" in multiprocessing.get_all_start_methods()  # Windows cannot fork
        if apart:
            multiprocessing.set_forkserver_preload([__name__])
        return DataLoader(
            samples,
            batch_size=size,
            shuffle=train,
            drop_last=train and full_batch,
            num_workers=workers,
            multiprocessing_context="forkserver" if apart else None,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=signals.ignore_signals,
            # otherwise each epoch draws from the process's generator, and a restarted epoch draws again
            generator=torch.Generator(),
        )

    def fit(self, label: str) -> None:
        """Train the remaining epochs; after each, evaluate, publish the files, and write a checkpoint.

        Raises:
            UserError: A loss or its gradient is not finite, an image is broken, or a file cannot be written.
            Stopped: A signal came; the last step is in a checkpoint.
        """
        progress, main = self.progress, self.accelerator.is_main_process
        total = self.settings.epochs * self.updates_per_epoch
        done = progress.epoch * self.updates_per_epoch + progress.step
        with (
            worker_errors(),
            log_curves(self.accelerator, done),
            signals.record_signals() as self.record,
            tqdm(total=total, initial=done, desc=label, disable=None if main else True) as bar,
        ):
            while progress.epoch < self.settings.epochs:
                loss = self._train_epoch(bar)
                measures = self.evaluate()
                images = progress.images * self.accelerator.num_processes
                progress.finish_epoch(measures, self.codebooks(), loss, images / max(progress.seconds, 1e-9))
                self.state.loss.zero_()
                if main:
                    self.publish()
                self.save()
                score = f"{100 * measures[self.score]:.1f} %"
                bar.set_postfix({"epoch": progress.epoch, "loss": f"{loss:.3f}", self.score_label: score})
                if main and bar.disable:  # in a log: a line an epoch in place of the bar
                    text = f"{label}: epoch {progress.epoch} of {self.settings.epochs}, loss {loss:.3f}"
                    say(f"{text}, {self.score_label} {score}", sys.stderr)
                self.stop_on_signal()
            if main and self.seed == self.settings.seed:
                self.finish()
        self.stop_on_signal()  # outside the body: no signal can come between this and the earlier handlers
        self.accelerator.free_memory()

    def _train_epoch(self, bar: tqdm) -> float:
        """Train the rest of the current epoch; return its mean loss."""
        progress, every = self.progress, self.settings.checkpoint_every
        self.model.train()
        self.samples.set_epoch(progress.epoch)
        started = time.perf_counter()
        for images, targets in self._batches_left():
            stop = self._step(images, targets)
            progress.step += 1
            progress.images += len(images)
            progress.seconds += time.perf_counter() - started
            bar.update()
            last = progress.step == self.updates_per_epoch
            if last and self.accelerator.num_processes > 1:
                distribute_bn(self.network, self.accelerator.num_processes, reduce=True)
                if self.ema is not None:  # checkpoints hold the first process's buffers
                    distribute_bn(self.ema.module, self.accelerator.num_processes, reduce=False)
            if stop:
                self.stop()
            if every and not last and (progress.epoch * self.updates_per_epoch + progress.step) % every == 0:
                self.save()
            started = time.perf_counter()
        return float(self.accelerator.reduce(self.state.loss, "mean")) / max(progress.finite, 1)

    def _batches_left(self) -> Iterable[Any]:
        """Return the remaining batches of the current epoch."""
        self.train_loader.set_epoch(self.progress.epoch)
        if self.progress.step == self.updates_per_epoch:
            return ()
        if not self.progress.step:
            return self.train_loader
        left = skip_first_batches(self.train_loader, self.progress.step)
        left.set_epoch(self.progress.epoch)
        return left

    def _step(self, images: Tensor, targets: Tensor) -> bool:
        """Train on a batch; return whether a signal has come."""
        progress, settings = self.progress, self.settings
        update = progress.epoch * self.updates_per_epoch + progress.step + 1
        images, targets = self.mix(images, targets)
        images = to_format(images, settings.channels_last)
        self.before.store()
        loss = self.loss(images, targets)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.unscale_gradients()
        norm = get_total_norm([each.grad for each in self.network.parameters() if each.grad is not None])
        # Together, because each read waits for a GPU.
        finite = torch.stack([loss.detach().float(), norm]).isfinite().tolist()
        broken_loss, broken_gradient, stop = self._any(not finite[0], not finite[1], self.record.signal is not None)
        scaler = self.accelerator.scaler
        # As long as fp16's scale is above 1, the scaler skips steps that are not finite, and lowers it.
        scaled = broken_gradient and scaler is not None and scaler.get_scale() > 1
        broken = broken_loss or (broken_gradient and not scaled)
        progress.lr = self.optimizer.param_groups[0]["lr"]
        if broken:
            self._skip_or_stop(loss.item(), images, broken_loss)
        else:
            if settings.clip_grad is not None:
                clip_grads_with_norm_(self.network.parameters(), settings.clip_grad, norm)
            self.optimizer.step()
            self.state.loss.add_(loss.detach())
            if self.accelerator.trackers:
                self.accelerator.log({"step/loss": loss.item(), "step/lr": progress.lr}, step=update)
            progress.finite += 1
        if self.scheduler is not None:
            self.scheduler.step_update(update)
        if self.ema is not None and not broken:
            self.ema.update(self.network, update)
        return stop

    def _any(self, *mine: bool) -> list[bool]:
        """Return for each flag whether it holds on any process."""
        if self.accelerator.num_processes == 1:
            return list(mine)
        counts = torch.tensor(mine, dtype=torch.float32, device=self.accelerator.device)
        return [count > 0 for count in self.accelerator.reduce(counts, "sum").tolist()]

    def _skip_or_stop(self, loss: float, images: Tensor, broken_loss: bool) -> None:
        """Skip a step with a loss or gradient that is not finite; stop after too many of them."""
        progress = self.progress
        mine = not broken_loss or not math.isfinite(loss)  # the gradient is shared by all processes
        found = [each for each in gather_object([(loss, self._batch_names() if mine else [])]) if each[1]]
        names = [name for _, names in found for name in names]
        step = f"step {progress.step + 1} of epoch {progress.epoch + 1}"
        what = f"the loss of {step} is {found[0][0]}" if broken_loss else f"the gradient of {step} is not finite"
        text = f"{what}, on {', '.join(names[:NAMED])}"
        if not broken_loss:
            text = f"{text}; {nonfinite_gradients(self.network, NAMED)}"
        if progress.skipped < self.settings.skip_nonfinite:
            progress.skipped += 1
            self.before.restore(generators=False)  # this batch may have spoilt the running statistics
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.update()  # otherwise it refuses the next gradient
            if self.accelerator.is_main_process:
                say(f"{text}; left out, {progress.skipped} of {self.settings.skip_nonfinite} that may be", sys.stderr)
            return
        self.before.restore()
        if broken_loss:
            with self.accelerator.autocast():
                layer = first_nonfinite(self.network, lambda: self.network(images))
            self.before.restore()
            text = f"{text}; it first arises in {layer}"
        raise UserError(f"{text}; the state before it is {self.save()}")

    def _batch_names(self) -> list[str]:
        """Return the names of this process's images in the current step."""
        self.train_loader.set_epoch(self.progress.epoch)  # the loader reads ahead, maybe into the next epoch
        indices = next(islice(iter(self.train_loader.batch_sampler), self.progress.step, None))
        return [self.samples.name(index) for index in indices]

    def until_stopped(self, batches: Iterable[Any], common: int) -> Iterator[Any]:
        """Yield `batches` until a signal comes; every process has at least `common` of them."""
        for number, batch in enumerate(batches):
            if number < common:
                self.stop_on_signal()
            yield batch

    def stop_on_signal(self) -> None:
        """Stop if a signal has come to any process."""
        if self._any(self.record.signal is not None)[0]:
            self.stop()

    def stop(self) -> None:
        """Save, and raise Stopped."""
        self.save()
        raise signals.Stopped(self.record.signal or signals.SIGNALS[0])

    def save(self) -> Path:
        """Write a checkpoint; return its folder."""
        return save_state(self.accelerator, self.arm, self.progress, self.state, self.settings.keep)
