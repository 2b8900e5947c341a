"""The rivals: the same step as ours, as people write it with transformers today.

    P0    the published recipe: fp32, every text padded to 128 tokens, eager attention, a plain loop
          with one AdamW update a tensor, TF32 off; "P0 tf32" is the same with TF32 on, which
          changes nothing on a CPU
    P1    transformers' Trainer with its defaults: sdpa attention, fused AdamW, texts padded to the
          longest of the batch (rounded up to a multiple of 8)
    P2    P1 without the Trainer's check of every loss for NaN, which waits for the device, and with
          TF32; `group_by_length` on top changes the batches and is reported apart
    P3    P2 under torch.compile, as the Trainer's `torch_compile=True` does it; without TF32, since
          under bf16 autocast there is no fp32 product
    P4    what an expert gets out of stock parts: transformers' BERT, bf16 autocast, texts padded to
          a few lengths, and for each of these the whole step in one CUDA graph, with a fused AdamW
          that keeps step and learning rate on the device. On a CPU the same loop without graphs.
    P6    P2 without padding: a batch is one row of all its texts end to end, which transformers'
          BERT takes with the keywords of flash attention (`position_ids`, `cu_seq_lens_q`, …). Its
          pooler reads that row's first token alone, so the first token of each text is pooled here.
          The attention is flash attention as torch ships it, with the dropout of BERT's config,
          registered in transformers' `AttentionInterface`; so the package flash_attn is not needed.
          On a CPU, where it does not exist, torch's SDPA on one text after the other stands in.

All have the recipe's head, its losses in torch's own operations, and the weights, texts and order
of ours.
"""

import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from itertools import accumulate
from time import perf_counter
from typing import Any

import torch
import transformers
from harness import StepClock
from torch import Tensor, nn
from torch.nn import functional as F

from twostage.model.bert import BertClassifier
from twostage.model.checkpoint import to_stored
from twostage.training.losses import effective_number_weights, ldam_margins

Loss = Callable[[Tensor, Tensor], Tensor]
MAX_LENGTH = 128
BUCKET = 8
"""P4 pads to multiples of this: at most 16 graphs, captured before the clock starts."""
PACKED = "packed_texts"
"""P6's attention in transformers' interface. A name with "flash" in it would ask for flash_attn."""


class PeerClassifier(nn.Module):
    """transformers' BERT with the recipe's head and the weights of one of our classifiers."""

    def __init__(self, ours: BertClassifier, attention: str, loss_function: Loss) -> None:
        """attention: "eager", "sdpa" or PACKED."""
        super().__init__()
        if attention == PACKED:
            transformers.AttentionInterface.register(PACKED, attend_packed)
        config = ours.bert.config
        settings = asdict(config) | {"attn_implementation": attention}
        self.bert = transformers.BertModel(transformers.BertConfig(**settings))
        tensors = {name: p.detach() for name, p in ours.bert.named_parameters()}
        stored = to_stored(tensors, config.num_hidden_layers)
        self.bert.load_state_dict({name.removeprefix("bert."): t for name, t in stored.items()})
        self.classifier = copy.deepcopy(ours.classifier)
        self.loss_function = loss_function

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
    ) -> dict[str, Tensor]:
        """A padded batch, as `pad` makes it, or a packed one, as `flatten` does.

        By name and not as `**packing`, for which the Trainer would take the loss for one that is
        summed over batches.
        """
        if cu_seq_lens_q is None:
            pooled_BD = self.bert(input_ids, attention_mask=attention_mask).pooler_output
        else:
            hidden_1TD = self.bert(
                input_ids,
                position_ids=position_ids,
                cu_seq_lens_q=cu_seq_lens_q,
                cu_seq_lens_k=cu_seq_lens_k,
                max_length_q=max_length_q,
                max_length_k=max_length_k,
            ).last_hidden_state
            assert self.bert.pooler is not None
            pooled_BD = self.bert.pooler(hidden_1TD[0, cu_seq_lens_q[:-1]][:, None])
        logits_BC = self.classifier(pooled_BD)
        return {"loss": self.loss_function(logits_BC, labels), "logits": logits_BC}

    def freeze_below_last_layer(self) -> None:
        self.bert.embeddings.requires_grad_(False)
        self.bert.encoder.layer[:-1].requires_grad_(False)


def attend_packed(
    module: nn.Module,
    query_1HTK: Tensor,
    key_1HTK: Tensor,
    value_1HTK: Tensor,
    attention_mask: None,
    *,
    dropout: float,
    scaling: float,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each text of a packed batch, [1, T, H, K], as transformers calls it.

    attention_mask: None, as transformers makes none for an attention that it does not know.
    """
    assert attention_mask is None
    if query_1HTK.device.type == "cpu":
        lengths = cu_seq_lens_q.diff().tolist()
        texts = (x.split(lengths, dim=2) for x in (query_1HTK, key_1HTK, value_1HTK))
        contexts = [
            F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling)
            for query, key, value in zip(*texts, strict=True)
        ]
        return torch.cat(contexts, dim=2).transpose(1, 2), None
    query, key, value = (x[0].transpose(0, 1) for x in (query_1HTK, key_1HTK, value_1HTK))
    # Its signature is held by a test of `kernels/flash_attention.py`, which calls the same.
    context_THK: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_k,
        max_length_q,
        max_length_k,
        dropout,
        False,  # causal
        False,  # return the mask
        scale=scaling,
    )[0]
    return context_THK[None], None


def stage_loss(stage: int, class_counts_C: list[int], device: torch.device) -> Loss:
    """The recipe's: LDAM with class weights in stage 1, cross-entropy in stage 2."""
    if stage == 2:
        return F.cross_entropy
    weights_C = effective_number_weights(class_counts_C).to(device)
    margins_C = ldam_margins(class_counts_C).to(device)

    classes_C = torch.arange(len(class_counts_C), device=device)

    def ldam(logits: Tensor, labels: Tensor) -> Tensor:
        is_true_class = labels[:, None] == classes_C
        return F.cross_entropy(logits - is_true_class * margins_C, labels, weights_C)

    return ldam


def pad(texts: list[dict[str, Any]], length: int | None = None) -> dict[str, Tensor]:
    """A batch padded to `length`, or to its longest text rounded up to a multiple of 8."""
    longest = max(len(text["input_ids"]) for text in texts)
    length = length or -(-longest // 8) * 8
    input_ids = torch.zeros(len(texts), length, dtype=torch.long)
    attention_mask = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in enumerate(texts):
        ids = text["input_ids"]
        input_ids[row, : len(ids)] = torch.as_tensor(ids)
        attention_mask[row, : len(ids)] = 1
    labels = torch.tensor([text["labels"] for text in texts])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def flatten(texts: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch in one row, as transformers' DataCollatorWithFlattening makes it; but labels are the
    texts', [B]."""
    ids = [torch.as_tensor(text["input_ids"], dtype=torch.long) for text in texts]
    lengths = [len(ids_L) for ids_L in ids]
    cu_seq_lens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "labels": torch.tensor([text["labels"] for text in texts]),
    }


@contextmanager
def tf32_products() -> Iterator[None]:
    """Within it, a GPU multiplies fp32 matrices in TF32.

    Torch has an old and a new switch, and refuses to read the old one after the new one alone was
    set. Setting the old one sets both (torch 2.11 to 2.13), and the new one then goes back to where
    it was, which the old one could not.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = before


def train_published(
    model: PeerClassifier,
    texts: list[dict[str, Any]],
    batch_size: int,
    learning_rate: float,
    device: torch.device,
    *,
    tf32: bool = False,
) -> None:
    """P0, or "P0 tf32"."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=learning_rate, weight_decay=0.0, foreach=False, fused=False
    )
    starts = range(0, len(texts), batch_size)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, len(starts))
    model.train()
    with tf32_products() if tf32 else nullcontext():
        for start in starts:
            batch = pad(texts[start : start + batch_size], MAX_LENGTH)
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()})["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def train_with_trainer(
    model: PeerClassifier,
    texts: list[dict[str, Any]],
    batch_size: int,
    learning_rate: float,
    device: torch.device,
    *,
    bf16: bool,
    tuned: bool = False,
    group_by_length: bool = False,
    compiled_by: str | None = None,
    packed: bool = False,
    on_loss: Callable[[Tensor], object] | None = None,
    on_batch: Callable[[list[int]], None] | None = None,
) -> None:
    """P1, P2 (`tuned`), P3 (`tuned`, and `compiled_by` a backend of torch.compile) or P6 (`tuned`
    and `packed`, with a model whose attention is PACKED).

    on_loss: called with each step's loss, outside of what is compiled. on_batch: gets the lengths
    of each batch's texts, in its order.
    """

    class Trainer(transformers.Trainer):
        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            loss = super().compute_loss(*arguments, **named)
            if on_loss is not None:
                assert isinstance(loss, Tensor)  # a tuple is for evaluation
                on_loss(loss)
            return loss

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        if on_batch is not None:
            on_batch([len(text["input_ids"]) for text in batch])
        return flatten(batch) if packed else pad(batch)

    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            learning_rate=learning_rate,
            bf16=bf16,
            use_cpu=device.type == "cpu",
            train_sampling_strategy="group_by_length" if group_by_length else "sequential",
            logging_nan_inf_filter=not tuned,
            tf32=choose_tf32(tuned, compiled_by, device),
            eval_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=device.type == "cuda",
            torch_compile=compiled_by is not None,
            torch_compile_backend=compiled_by,
        )
        trainer = Trainer(model, settings, data_collator=collate, train_dataset=texts)
        trainer.train()


def choose_tf32(tuned: bool, compiled_by: str | None, device: torch.device) -> bool | None:
    """`tf32` of the Trainer; None: as it is.

    Compiled, in bf16, the Trainer turns TF32 on unless it is told False; None is not enough. It
    sets torch's new switch alone, and then torch refuses to read the old one, as inductor of some
    versions does. Nothing is lost by False: under bf16 autocast there is no fp32 product.
    """
    if not tuned or device.type == "cpu":
        return None
    return compiled_by is None


def train_with_graphs(
    model: PeerClassifier,
    texts: list[dict[str, Any]],
    batch_size: int,
    learning_rate: float,
    device: torch.device,
    clock: StepClock,
    *,
    capture: bool = True,
) -> None:
    """P4. All batches lie on the device and all graphs are captured before the first step; the
    clock counts that as warm-up. capture: False runs each step eagerly, as a CPU does."""
    capture = capture and device.type == "cuda"
    stepper = _GraphedStep(model, batch_size, learning_rate, device, capture)
    starts = range(0, len(texts), batch_size)
    batches = [
        {
            name: tensor.to(device)
            for name, tensor in pad_to_bucket(texts[i : i + batch_size]).items()
        }
        for i in starts
    ]
    began = perf_counter()
    for length in sorted({batch["input_ids"].shape[1] for batch in batches}, reverse=True):
        stepper.prepare(length)
    clock.capture_seconds = perf_counter() - began if capture else 0.0
    for step, batch in enumerate(batches):
        loss = stepper.run(batch, learning_rate * (1 - step / len(batches)))
        clock.tick(loss)


def pad_to_bucket(texts: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch padded to its longest text, rounded up to a bucket."""
    longest = max(len(text["input_ids"]) for text in texts)
    return pad(texts, min(MAX_LENGTH, math.ceil(longest / BUCKET) * BUCKET))


class _GraphedStep:
    """Forward, backward, clipping and AdamW as one graph for each padded length."""

    def __init__(
        self,
        model: PeerClassifier,
        batch_size: int,
        learning_rate: float,
        device: torch.device,
        capture: bool,
    ) -> None:
        self.captures = capture
        self.model = model.train()
        self.device = device
        self.batch_size = batch_size
        self.trained: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        on_gpu = device.type == "cuda"
        self.learning_rate = torch.tensor(learning_rate, device=device)
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=self.learning_rate, weight_decay=0.0, fused=True, capturable=on_gpu
        )
        self.inputs: dict[int, dict[str, Tensor]] = {}
        self.graphs: dict[int, Any] = {}
        self.losses: dict[int, Tensor] = {}
        self.pool = torch.cuda.graph_pool_handle() if capture else None

    def prepare(self, length: int) -> None:
        """Make buffers and graph for batches padded to `length`; weights stay as they are."""
        shape = (self.batch_size, length)
        self.inputs[length] = {
            "input_ids": torch.randint(1_000, 2_000, shape, device=self.device),
            "attention_mask": torch.ones(shape, dtype=torch.long, device=self.device),
            "labels": torch.zeros(self.batch_size, dtype=torch.long, device=self.device),
        }
        if not self.captures:
            return
        weights = [p.detach().clone() for p in self.trained]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm up: libraries, allocator, the optimizer's state
            for _ in range(3):
                self.optimizer.zero_grad(set_to_none=True)
                self._step(length)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            torch._foreach_copy_(self.trained, weights)
            for state in self.optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()
        self.optimizer.zero_grad(set_to_none=True)  # so that the graph owns its gradients
        self.graphs[length] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graphs[length], pool=self.pool):
            self.losses[length] = self._step(length)

    def run(self, batch: dict[str, Tensor], learning_rate: float) -> Tensor:
        length = batch["input_ids"].shape[1]
        for name, tensor in batch.items():
            self.inputs[length][name].copy_(tensor)
        self.learning_rate.fill_(learning_rate)
        if self.captures:
            self.graphs[length].replay()
            return self.losses[length].clone()
        self.optimizer.zero_grad(set_to_none=True)
        return self._step(length)

    def _step(self, length: int) -> Tensor:
        inputs = self.inputs[length]
        # A finished mask: transformers would otherwise read the padding back on the host.
        mask = inputs["attention_mask"].bool()[:, None, None, :].expand(-1, 1, length, -1)
        # A weight's cast must not be cached from one replay to the next.
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            loss: Tensor = self.model(inputs["input_ids"], inputs["labels"], mask)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0, foreach=True)
        self.optimizer.step()
        return loss.detach()
