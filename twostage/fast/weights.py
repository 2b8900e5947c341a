"""Trained weights end to end, their rounded twins, and only the words that occur.

What is saved, and why it is exact:

    flat      The fp32 weights, their gradients and moments each lie end to end in one buffer, of
              which the parameters are views: clipping and AdamW pass over buffers, not over two
              hundred parameters. The same arithmetic on the same numbers.
    rounded   Forward and backward run on a second model in bf16 or fp16, and the optimizer rounds
              each new weight into it as it writes it. So no weight is rounded once per use, and
              the rounded weights are those that the plain step makes.
    words     Without weight decay, AdamW never moves a row that has no gradient (its moments stay
              0). So of the word embeddings only the rows of tokens that the data have are trained:
              of BERT's 30,522 a third for some thousand short texts, and with it go two thirds of
              the optimizer's work on the largest table.

What it gave on a CPU, at batch 16: the words 7 to 8 % of stage 2, the flat buffers 62 MiB
(`benchmarks/README.md`). What the rounded model gives alone has not been measured.

Each parameter begins at a multiple of 64 bytes, with zeros between it and the one before: on some
CPUs the last bit of a product with one row, as in a batch of one text, depends on the weight's
address.

Shapes: V' tokens in use, D hidden, P trained weights with the zeros between them.
"""

from functools import partial

import torch
from torch import Tensor, nn

from ..data.token_store import TokenStore
from ..errors import UsageError
from ..kernels.adamw import adamw_
from ..model.assembly import round_classifier
from ..training.optim import MAX_GRAD_NORM
from ..training.state import TrainingState

WORD_EMBEDDINGS = "bert.embeddings.word.weight"
ALIGN_TO = 32
"""Weights: 64 bytes in 16 bits, as torch aligns its own memory; 128 in fp32."""


class FlatWeights:
    """What is trained, with its gradients and moments, and the rounded model that computes.

    Made after freezing: only what then requires a gradient is trained and refreshed. Use it in a
    `with` block: when that is left, for whatever reason, the word embeddings are up to date too.
    """

    def __init__(
        self,
        state: TrainingState,
        dtype: torch.dtype,
        used_tokens_V: Tensor | None = None,
        impl: str = "auto",
    ) -> None:
        """dtype: what the rounded model computes in. used_tokens_V: [V'] integer, the tokens whose
        embeddings are trained, of which the rounded model knows the i-th as token i; None: all.
        impl: how the operations run."""
        model, self._impl = state.model, impl
        masters = dict(model.named_parameters())
        self._all_words, self._used_tokens_V = masters[WORD_EMBEDDINGS], used_tokens_V
        if used_tokens_V is not None:
            rows_VD = self._all_words.detach()[used_tokens_V]
            masters[WORD_EMBEDDINGS] = nn.Parameter(rows_VD, self._all_words.requires_grad)
        self._words = masters[WORD_EMBEDDINGS]
        trained = {name: master for name, master in masters.items() if master.requires_grad}
        self.masters = list(trained.values())
        sizes = [-(-master.numel() // ALIGN_TO) * ALIGN_TO for master in self.masters]
        self._exp_avg_P, self._exp_avg_sq_P, self._updates = _take_moments(
            state, sum(sizes), model.device
        )
        self.weights_P = torch.zeros(sum(sizes), device=model.device)
        """The fp32 weights, end to end."""
        for master, weights in zip(self.masters, self.weights_P.split(sizes), strict=True):
            master.data = _view_like(master, weights).copy_(master.detach())

        self.model = round_classifier(model.bert.config, masters, dtype, impl)
        # On a CPU, naming the rows that have a gradient is far cheaper than a table of zeros.
        self.model.bert.embeddings.word.sparse = model.device.type == "cpu"
        # Embeddings come first and are not rounded. Norms that are not rounded either still occupy
        # unused space in `rounded_P`, about a thousandth of it.
        kept = [n for n in trained if dtype == torch.float32 or n.startswith("bert.embeddings.")]
        self._num_unrounded = sum(sizes[: len(kept)])
        self.rounded_P = self.weights_P[self._num_unrounded :].to(dtype)
        """All but the first weights, in `dtype`."""
        twins = [self.model.get_parameter(name) for name in trained]
        rounded = self.rounded_P.split(sizes[len(kept) :])
        for twin, weights in zip(twins[len(kept) :], rounded, strict=True):
            if twin.dtype == dtype:
                twin.data = _view_like(twin, weights)

        self._gradients_P = torch.zeros_like(self.weights_P)
        for master, gradient in zip(self.masters, self._gradients_P.split(sizes), strict=True):
            master.grad = _view_like(master, gradient)
        self._hooks = [
            twin.register_post_accumulate_grad_hook(partial(self._collect, master))
            for master, twin in zip(self.masters, twins, strict=True)
        ]
        self._arrived: list[tuple[Tensor, Tensor]] = []  # (where it is to be, the gradient)
        self._num_arrived = 0
        # On a CPU a gradient is copied while it is in the cache; a GPU takes many at one launch.
        self._copies_at_once = model.device.type == "cuda"

    def __enter__(self) -> "FlatWeights":
        return self

    def __exit__(self, *_: object) -> None:
        for hook, master in zip(self._hooks, self.masters, strict=True):
            hook.remove()  # it refers to this object, which else would live on in a circle
            master.grad = None
        if self._used_tokens_V is not None:
            with torch.no_grad():
                self._all_words[self._used_tokens_V] = self._words

    def take_gradients(self) -> Tensor:
        """The gradients of the last backward, end to end: [P] fp32, the same memory each time."""
        assert self._num_arrived == len(self.masters), "every trained parameter has a gradient"
        for dtype in dict.fromkeys(gradient.dtype for _, gradient in self._arrived):
            pairs = [pair for pair in self._arrived if pair[1].dtype == dtype]
            torch._foreach_copy_([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        self._arrived, self._num_arrived = [], 0
        return self._gradients_P

    def _collect(self, master: Tensor, twin: Tensor) -> None:
        """Called in backward as soon as the twin's gradient is there."""
        gradient, twin.grad = twin.grad, None
        assert gradient is not None
        assert master.grad is not None
        if gradient.is_sparse:
            master.grad.zero_().index_add_(0, gradient._indices()[0], gradient._values())
        elif self._copies_at_once:
            self._arrived.append((master.grad, gradient))
        else:
            master.grad.copy_(gradient)
        self._num_arrived += 1

    @torch.no_grad()
    def update(
        self, gradients_P: Tensor, learning_rate: Tensor, divisor: Tensor, skip: Tensor
    ) -> None:
        """One step of AdamW on the fp32 weights, and their rounding into the other model.

        learning_rate (fp64), divisor, skip (bool): scalars on the device. The gradients are
        divided by `divisor`; with `skip` nothing happens.
        """
        self._updates.add_(~skip)
        border, skip_number = self._num_unrounded, skip.float()
        for part, rounded_P in ((slice(border), None), (slice(border, None), self.rounded_P)):
            adamw_(
                self.weights_P[part],
                gradients_P[part],
                self._exp_avg_P[part],
                self._exp_avg_sq_P[part],
                self._updates,
                learning_rate,
                divisor,
                skip_number,
                rounded_P=rounded_P,
                impl=self._impl,
            )


def clip_divisor(gradients_P: Tensor, loss_factor: Tensor) -> tuple[Tensor, Tensor]:
    """(norm, divisor): dividing the gradients by `divisor` clips their L2 norm at MAX_GRAD_NORM.

    loss_factor: scalar by which the loss was multiplied, and so the gradients; norm and clipping
    are those without it. Both results are scalars on the device. The division is left to the
    optimizer, which reads every gradient anyway.
    """
    norm = torch.dot(gradients_P, gradients_P).sqrt() / loss_factor
    return norm, ((norm + 1e-6) / MAX_GRAD_NORM).clamp(min=1.0) * loss_factor


def renumber_tokens(store: TokenStore) -> tuple[TokenStore, Tensor]:
    """(the store with its tokens renumbered from 0, used_tokens_V: which they are).

    Token i of the new store is token `used_tokens_V[i]` of the old one, [V'] integer, ascending.
    """
    used_tokens_V, ids = torch.unique(store.ids, return_inverse=True)
    return TokenStore(ids.int(), store.offsets), used_tokens_V


def _take_moments(
    state: TrainingState, num_weights: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW's moments and the number of its updates, zeros at the beginning of a stage."""
    if not state.optimizer:
        state.optimizer = {
            "exp_avg_P": torch.zeros(num_weights, device=device),
            "exp_avg_sq_P": torch.zeros(num_weights, device=device),
            "updates": torch.zeros((), device=device),
        }
    if "exp_avg_P" not in state.optimizer:
        raise UsageError("the stage was begun by the plain step; go on with engine 'plain'")
    moments = state.optimizer["exp_avg_P"], state.optimizer["exp_avg_sq_P"]
    assert len(moments[0]) == num_weights, "moments of another table"
    return *moments, state.optimizer["updates"]


def _view_like(parameter: Tensor, room: Tensor) -> Tensor:
    """The first of the room's numbers, in the parameter's shape."""
    return room[: parameter.numel()].view_as(parameter)
