"""The optimisers that are compared, each with its schedule: PyTorch's, those of packages that are installed, ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, ReduceLROnPlateau

from firmly.errors import DataError
from firmly.optim import APosteriori, BlockKalman, Feedback, LayerRls, PageHinkley, presets
from firmly.optim.line_search import ArmijoSearch
from firmly.optim.polyak import PolyakStep
from firmly.optim.streaming import StreamLearner

PACKAGES = ("schedulefree", "prodigyopt", "dadaptation")
PID = presets.pid(3.0, 100.0, 0.9)  # the published setting for MNIST: An et al., CVPR 2018
TUSTIN = presets.tustin(0.9)
POSITIVE_REAL = presets.heavy_ball(1 / 3)  # the most momentum whose filter is positive real with the integrator

SKIPPED = 0.5  # of the mean loss: batches below are not learnt from
KALMAN = 256  # parameters of a block, whose gain is a matrix
EPOCH = 50  # batches in which the steps of Polyak and Armijo may double


class Horizon(NamedTuple):
    """The steps of a run, those of an epoch (of a window, on a stream), those between known drifts."""

    steps: int
    window: int
    chunk: int | None = None


class Schedule(NamedTuple):
    """What is done after every step, and after every window with its mean loss."""

    after_step: Callable[[], Any] = lambda: None
    after_window: Callable[[float], Any] = lambda loss: None


Schedules = Callable[[Optimizer, Horizon], Schedule]


def constant(optimizer: Optimizer, horizon: Horizon) -> Schedule:
    return Schedule()


def cosine(optimizer: Optimizer, horizon: Horizon) -> Schedule:
    """From the rate to 0 over the whole run, whose length is known."""
    return Schedule(CosineAnnealingLR(optimizer, horizon.steps).step)


def restarted(optimizer: Optimizer, horizon: Horizon) -> Schedule:
    """A cosine from one known drift to the next."""
    assert horizon.chunk is not None
    return Schedule(CosineAnnealingWarmRestarts(optimizer, horizon.chunk).step)


def plateau(optimizer: Optimizer, horizon: Horizon) -> Schedule:
    """Half the rate after three windows in which the training loss has not fallen."""
    return Schedule(after_window=ReduceLROnPlateau(optimizer, factor=0.5, patience=2).step)


def feedback(optimizer: Optimizer, horizon: Horizon) -> Schedule:
    return Schedule(after_window=_controller(optimizer).update)


def each_chunk(optimizer: Optimizer, horizon: Horizon) -> Schedule:
    """`feedback` that begins again at known drifts, as published."""
    assert horizon.chunk is not None
    controller, windows = _controller(optimizer), round(horizon.chunk / horizon.window)

    def after_window(loss: float) -> None:
        nonlocal seen
        seen += 1
        controller.update(loss)
        if seen % windows == 0:
            controller.restart()

    seen = 0
    return Schedule(after_window=after_window)


def held(optimizer: Optimizer, horizon: Horizon) -> Schedule:
    return Schedule(after_window=_controller(optimizer, hold=True).update)


def _controller(optimizer: Optimizer, hold: bool = False) -> Feedback:
    """With the published ceiling, but for base rates above it."""
    return Feedback(optimizer, ceiling=max(4.0, optimizer.param_groups[0]["lr"]), hold=hold)


class Method(NamedTuple):
    """An optimiser with its schedule; `role` is that of its curves. `drifts`: it has to know them.

    A `StreamLearner` has its schedule inside: `stream` makes it from the network, the rate and the horizon. `of_model`
    makes an optimiser that has to see the network, in the place of `make`.
    """

    name: str
    make: Callable[[list[Parameter], float], Optimizer] = SGD
    schedule: Schedules = constant
    role: Literal["ours", "other"] = "other"
    drifts: bool = False
    stream: Callable[[nn.Module, float, Horizon], StreamLearner] | None = None
    of_model: Callable[[nn.Module, float], Optimizer] | None = None

    def start(self, net: nn.Module, rate: float, horizon: Horizon) -> Learner:
        if self.stream is not None:
            return Streaming(self.stream(net, rate, horizon))
        optimizer = self.of_model(net, rate) if self.of_model else self.make(list(net.parameters()), rate)
        return Stepping(net, optimizer, self.schedule(optimizer, horizon))


class Learner(Protocol):
    """A network in the hands of a method."""

    @property
    def forward(self) -> int: ...

    @property
    def backward(self) -> int: ...

    def learn(self, x: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        """One step on a batch; its outputs and its loss before the step, not finite where training diverged."""
        ...

    def end_window(self, loss: float) -> None:
        """The mean loss of an epoch, or of a window of a stream."""
        ...

    def predicting(self) -> AbstractContextManager[None]:
        """With the weights that are meant for predictions, and without gradients."""
        ...


class Stepping:
    """By a PyTorch optimiser, which evaluates the loss as often as it likes."""

    def __init__(self, net: nn.Module, optimizer: Optimizer, schedule: Schedule):
        self.net, self.optimizer, self.schedule = net, optimizer, schedule
        self.averages = hasattr(optimizer, "eval")  # it predicts with other weights than it learns with
        if self.averages:
            optimizer.train()
        self.forward = self.backward = 0

    def learn(self, x: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        seen: list[Tensor] = []

        def loss() -> Tensor:
            self.forward += 1
            seen.append(self.net(x))
            return cross_entropy(seen[-1], labels)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            value = loss()
            value.backward()
            self.backward += 1
            return value.detach()

        if self.averages:
            with self.predicting():
                loss()
        searches = isinstance(self.optimizer, ArmijoSearch)  # takes the gradient itself, of the first of its losses
        self.backward += searches
        try:
            value = float(self.optimizer.step(loss if searches else closure))
        except DataError:
            value = math.nan
        self.schedule.after_step()
        return seen[0].detach(), value

    def end_window(self, loss: float) -> None:
        self.schedule.after_window(loss)

    @contextmanager
    def predicting(self) -> Iterator[None]:
        if self.averages:
            self.optimizer.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            if self.averages:
                self.optimizer.train()


class Streaming:
    """By a `StreamLearner`, which skips backward passes and looks after its rate itself."""

    def __init__(self, learner: StreamLearner):
        self.learner = learner

    @property
    def forward(self) -> int:
        return self.learner.forwards

    @property
    def backward(self) -> int:
        return self.learner.backwards

    def learn(self, x: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        try:
            learned = self.learner.learn(x, labels)
        except DataError:
            with torch.no_grad():
                return self.learner.model(x), math.nan
        return learned.outputs, learned.loss

    def end_window(self, loss: float) -> None:
        pass

    @contextmanager
    def predicting(self) -> Iterator[None]:
        with torch.no_grad(), self.learner.predicting():
            yield


def hybrid(threshold: float) -> Callable[[nn.Module, float, Horizon], StreamLearner]:
    return lambda net, rate, horizon: StreamLearner.hybrid(net, cross_entropy, rate, threshold)


def feedback_with_alarms(net: nn.Module, rate: float, horizon: Horizon) -> StreamLearner:
    """`feedback` that begins again where the loss rises for good."""
    optimizer = SGD(net.parameters(), rate)
    return StreamLearner(
        net, cross_entropy, optimizer, _controller(optimizer), change=PageHinkley(), window=horizon.window
    )


def kalman(params: list[Parameter], lr: float) -> Optimizer:
    return BlockKalman(params, lr, block=KALMAN)


def momentum(schedule: Schedules, name: str) -> Method:
    return Method(name, lambda p, lr: SGD(p, lr, momentum=0.9), schedule)


def methods() -> list[Method]:
    """All that can be compared here, peers first."""
    return [
        Method("SGD", SGD),
        Method("SGD, cosine", SGD, cosine),
        Method("SGD, cosine between drifts", SGD, restarted, drifts=True),
        momentum(constant, "momentum 0.9"),
        momentum(cosine, "momentum 0.9, cosine"),
        momentum(plateau, "momentum 0.9, plateau"),
        Method("Nesterov 0.9", lambda p, lr: SGD(p, lr, momentum=0.9, nesterov=True)),
        Method("PID (3, 100, 0.9)", PID),
        Method("RMSprop", RMSprop),
        Method("Adam", Adam),
        Method("Adam, cosine", Adam, cosine),
        Method("AdamW", AdamW),
        Method("NAdam", NAdam),
        Method("Polyak step", lambda p, lr: PolyakStep(p, lr, batches=EPOCH)),
        Method("Armijo search", lambda p, lr: ArmijoSearch(p, lr, batches=EPOCH)),
        *_of_packages(),
        Method("Dag, heavy ball 1/3", POSITIVE_REAL, role="ours"),
        Method("Dag, Tustin 0.9", TUSTIN, role="ours"),
        Method("a posteriori", APosteriori, role="ours"),
        Method("a posteriori, Tustin 0.9", lambda p, lr: APosteriori(p, lr, TUSTIN.gain), role="ours"),
        Method("Feedback, SGD", SGD, feedback, "ours"),
        Method("Feedback, SGD, alarms", stream=feedback_with_alarms, role="ours"),
        Method("Feedback, held, SGD", SGD, held, "ours"),
        Method("Feedback, SGD, told of drifts", SGD, each_chunk, "ours", drifts=True),
        Method("RLS of layers", role="ours", of_model=lambda net, lr: LayerRls(net, lr)),
        Method("Kalman in blocks", kalman, role="ours"),
        Method("hybrid", stream=hybrid(0.0), role="ours"),
        Method("hybrid, skipping", stream=hybrid(SKIPPED), role="ours"),
    ]


def missing() -> list[str]:
    """The packages of peers that are not installed."""
    return [name for name in PACKAGES if _package(name) is None]


def _of_packages() -> list[Method]:
    found: list[Method] = []
    if (package := _package("schedulefree")) is not None:
        free, adam = package.SGDScheduleFree, package.AdamWScheduleFree
        found.append(Method("schedule-free SGD", lambda p, lr: free(p, lr, momentum=0.9)))
        found.append(Method("schedule-free AdamW", lambda p, lr: adam(p, lr)))
    if (package := _package("prodigyopt")) is not None:
        prodigy = package.Prodigy
        found.append(Method("Prodigy", lambda p, lr: prodigy(p, lr)))
    if (package := _package("dadaptation")) is not None:
        adapted = package.DAdaptSGD
        found.append(Method("D-Adaptation, SGD", lambda p, lr: adapted(p, lr)))
    return found


def _package(name: str) -> Any | None:
    try:
        return import_module(name)
    except ImportError:
        return None
