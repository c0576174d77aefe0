"""Lease: the adapters of one request on a model that several requests, and threads, share.

`with lease:` gives the model to the request: other threads wait, its adapters are attached, and those of other
requests are not. Leaving the block lets others have the model but detaches nothing yet, so that a request that goes on
with its next batch pays nothing; the adapters are detached when another lease is entered, or at `close`. So a
generator that is suspended, or forgotten, blocks nobody. Adapters that the caller attached to the model itself apply
to every request.

After `close` the weights are bit for bit what they were. The weights folded last are kept, within `KEEP_BYTES`, for the
next request with the same adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from gouache.adapters.attach import How, Suspended
from gouache.adapters.strength import Strength
from gouache.files.record import ModelFile
from gouache.model.attach import Attached, attach_unlocked
from gouache.model.model import Model
from gouache.model.vae import AnyVae

KEEP_BYTES = 1 << 30


@dataclass(frozen=True)
class Use:
    """An adapter file as a request uses it. `name`: what an embedding is called in prompts."""

    file: ModelFile
    strength: Strength = Strength()  # noqa: RUF009  # frozen
    how: How | None = None
    name: str | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for equal adapters; the time tells a file that was replaced meanwhile."""
        stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.file.files]
        return stamps, self.strength, self.how, self.name


class Lease:
    """`uses` are attached in order; `vae` (module, its file) replaces the model's while the lease is held."""

    def __init__(
        self, model: Model, uses: Sequence[Use] = (), vae: tuple[AnyVae, ModelFile | None] | None = None
    ) -> None:
        self.attached: list[Attached] = []
        self._model, self._uses, self._vae = model, tuple(uses), vae
        self._suspended: Suspended | None = None
        self._keys: list[tuple[object, ...]] = []
        self._upcast: list[str] = []  # stages that this lease's adapters need in float32
        self._upcast_before: list[str] = []
        self._own_vae: tuple[AnyVae, ModelFile | None] | None = None
        self._own_vae_upcast = False
        self._outer: list[Lease | None] = []
        self._closed = False

    def __enter__(self) -> Lease:
        model = self._model
        model.lock.acquire()
        holder = model.holder
        try:
            if holder is not self:
                if holder is not None:
                    holder._suspend()
                self._resume()
        except BaseException:
            try:
                if holder is not None and holder is not self and holder._outer:
                    holder._resume()  # this was a request made from its callback, and it goes on
            finally:
                model.lock.release()
            raise
        self._outer.append(holder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outer = self._outer.pop()
        try:
            if outer is not None and outer is not self and outer._outer:  # a request made from another's callback
                self._suspend()
                outer._resume()
        finally:
            self._model.lock.release()

    def close(self) -> None:
        """Detach everything. Does nothing if another lease has done so."""
        with self._model.lock:
            if self._model.holder is self:
                self._suspend()
            self._closed = True
            self._vae = None  # a lease that is kept for its folded weights keeps no module alive

    def _suspend(self) -> None:
        """Detach everything. An interrupt is raised only after that is complete: nothing may stay half attached."""
        try:
            self._detach()
        except BaseException:
            self._detach()
            raise

    def _detach(self) -> None:
        """Can be run again after an interrupt at any place."""
        model = self._model
        mine = [each.on_weights for each in self.attached if each.on_weights is not None]
        for each in self.attached:
            each.disable()
        if set(mine) & set(model.adapters):
            self._suspended = Suspended(tuple(mine), {}, -1)  # if interrupted: to be folded again
            self._suspended = model.adapters.suspend(mine, KEEP_BYTES)
            if model.spare is not None and model.spare is not self:
                model.spare._drop()
            model.spare = self
        if self._own_vae is not None:
            if self._vae is not None and model.vae is self._vae[0]:
                model.vae, model.vae_file = self._own_vae
            self._own_vae = None
        if self.attached or self._vae is not None:
            for stage in [each for each in model.upcast if each not in self._upcast_before]:
                if stage == "VAE" and self._vae is None:
                    continue  # no adapter changes the VAE: its weights overflow by themselves
                if stage not in self._upcast:
                    self._upcast.append(stage)
                if stage == "VAE":
                    model.upcast.remove(stage)  # the replaced module stays in float32
                else:
                    model.narrow(stage)
        if self._own_vae_upcast:
            if "VAE" not in model.upcast:
                model.upcast.append("VAE")
            self._own_vae_upcast = False
        model.holder = None  # last: until then `close` has something to do

    def _resume(self) -> None:
        model = self._model
        model.holder = self
        before = set(model.adapters)
        try:
            self._upcast_before = list(model.upcast)
            if self._vae is not None:
                self._own_vae = model.vae, model.vae_file
                self._own_vae_upcast = "VAE" in model.upcast
                self._upcast_before = [stage for stage in model.upcast if stage != "VAE"]
                model.upcast[:] = self._upcast_before
                model.vae, model.vae_file = self._vae
            self._attach()
            for stage in self._upcast:
                if stage not in model.upcast:
                    model.widen(stage)
        except BaseException:
            for each in set(model.adapters) - before:  # also one that was not handed over yet
                model.adapters.detach(each)
            self._suspend()
            if len(self.attached) < len(self._uses):  # never to be taken for the whole
                self.attached, self._suspended = [], None
                model.spare = None if model.spare is self else model.spare
            raise

    def _attach(self) -> None:
        model = self._model
        if not self.attached and self._uses:
            self._keys = [use.key for use in self._uses]
            spare = model.spare
            if spare is not None and spare._closed and spare._keys == self._keys:
                self.attached, self._suspended = spare.attached, spare._suspended
                model.spare = None
        if not self.attached:
            for use in self._uses:
                self.attached.append(attach_unlocked(model, use.file, use.strength, how=use.how, name=use.name))
            return
        if self._suspended is not None:
            model.adapters.resume(self._suspended)
            self._suspended = None
        for each in self.attached:
            each.enable()

    def _drop(self) -> None:
        """Keep no folded weights; they are folded again when needed."""
        if self._suspended is not None:
            self._suspended = replace(self._suspended, folded={})
