"""GPT-Neo or GPT-2 with attention through Gaussian splats, for `transformers` 4.57 and 5.

A head has S splats with centres c_s and scales sigma_s, an exact window of W tokens, and M kept keys:

    log phi_s(x) = -|x - c_s|^2 / (2 sigma_s^2)

    near(i, j)   = q_i . k_j                                      what divides GPT-2's scores is in q and k
    far(i, j)    = logsumexp_s( log phi_s(q_i) + log phi_s(k_j) + log a_s ) + beta (|q_i|^2 + |k_j|^2) + lambda

    score(i, j)  = near(i, j) if i - j < W, or j is kept at i; far(i, j) otherwise; of the keys that i sees
    output_i     = sum_j softmax_j(score(i, .)) v_j

Kept at i are, of the keys with i - j >= W that i sees, the M of the greatest importance; of equals, the older one. The
importance of a key is |k|^2, or a weighted sum of key, value and |k|^2. Distances i - j count slots, padding included.

This is the definition, computed score by score: time grows with the square of the length. Memory does not, for a few
queries are read at a time. `generate` keeps all keys and values, as it does for GPT-Neo.

May be changed here: nothing but how the definition is computed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPTNeoForCausalLM, GPTNeoModel, GPTNeoPreTrainedModel
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from .configuration_gsa import GSAConfig

_AT_ONCE = 2**24
"""Scores through single splats that are in memory at once; those of one query at least."""


class DonorSelfAttention(GPTNeoSelfAttention):
    """GPT-Neo's attention, or GPT-2's: with biases of all projections, and scaled scores."""

    def __init__(self, config: GSAConfig, attention_type: str, layer_id: int) -> None:
        super().__init__(config, attention_type, layer_id)
        self.query_scale, self.key_scale = config.score_scales(layer_id)
        if config.attention_bias:
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(self, name, nn.Linear(self.embed_dim, self.embed_dim, bias=True))

    def _attn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and results as `GSASelfAttention._attn` has them; with the weights."""
        of_transformers_4 = () if head_mask is None else (head_mask,)
        return super()._attn(*self._scaled(query, key), value, attention_mask, *of_transformers_4)

    def _scaled(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Both such that their product is the score; in float32 where they are scaled."""
        if (self.query_scale, self.key_scale) == (1, 1):
            return query, key
        return _wide(query) * self.query_scale, _wide(key) * self.key_scale


class GSASelfAttention(DonorSelfAttention):
    """The attention of a model without splats, with another `_attn`; projections, cache and dropout are its own.

    Parameters, with H heads of dimension D, in float32; those of splats only where there are any:
        splat_centers: c, `[H, S, D]`.
        splat_log_scales: log sigma, `[H, S]`.
        splat_log_amplitudes: log a, `[H, S]`; `None` means 0.
        splat_norm_gain: beta, `[H]`; `None` means 0.
        splat_far_gain: lambda, `[H]`; `None` means 0.
        splat_importance: weights of a key, of its value and of `|key|^2` in the importance of the key, `[H, 2 D + 1]`,
            without a gradient; `None` means `|key|^2` alone.
    """

    splat_centers: Tensor
    splat_log_scales: Tensor
    splat_log_amplitudes: Tensor | None
    splat_norm_gain: Tensor | None
    splat_far_gain: Tensor | None
    splat_importance: Tensor | None

    def __init__(self, config: GSAConfig, attention_type: str, layer_id: int) -> None:
        super().__init__(config, attention_type, layer_id)
        own = config.layer_splats(layer_id)
        assert own is not None and config.splats is not None, "layers without splats are another class's"
        self.num_splats, self.kept = own.num_splats, own.kept
        self.window = math.inf if own.window == "all" else int(own.window)
        heads, dim, splats = self.num_heads, self.head_dim, self.num_splats
        shapes = {
            "centers": (heads, splats, dim),
            "log_scales": (heads, splats),
            "log_amplitudes": (heads, splats) if config.splats["log_amplitudes"] else None,
            "norm_gain": (heads,) if config.splats["norm_gain"] else None,
            "far_gain": (heads,) if config.splats["far_gain"] else None,
        }
        for name, shape in shapes.items():
            parameter = None if shape is None or not splats else nn.Parameter(torch.zeros(shape))
            self.register_parameter(f"splat_{name}", parameter)
        # What transformers 5 loads into a parameter has a gradient; into a buffer, it has none.
        importance = torch.zeros(heads, 2 * dim + 1, dtype=torch.float32)
        self.register_buffer("splat_importance", importance if config.splats["importance"] == "learned" else None)

    def _attn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends with the last T of K tokens as queries.

        Args:
            query: `[B, H, T, D]`.
            key: of the cache and of these tokens, `[B, H, K, D]`.
            value: `[B, H, K, D]`.
            attention_mask: `[B, 1, T, K]` or with more keys than there are yet; 0 (or true) where a query may see a
                key. Every query sees all keys up to its own if None.
            head_mask: given by transformers 4 alone.

        Returns:
            The output `[B, H, T, D]`, and no weights: nothing holds all of them at once.
        """
        if self.window == math.inf:
            return super()._attn(query, key, value, attention_mask, head_mask)
        query, key = self._scaled(query, key)
        batch, heads, length, _ = query.shape
        slots = key.shape[2]
        size = max(1, _AT_ONCE // (batch * heads * slots * max(1, self.num_splats)))
        outputs = []
        with torch.autocast(query.device.type, enabled=False):
            rank = self._rank(_wide(key), _wide(value))
            for first in range(0, length, size):
                rows = slice(first, first + size)
                end = min(slots - length + first + size, slots)  # later keys are seen by none of these queries
                mask = None if attention_mask is None else attention_mask[:, :, rows, :end]
                given = query[:, :, rows], key[:, :, :end], value[:, :, :end], rank[:, :, :end], mask, head_mask
                if torch.is_grad_enabled():
                    # The backward pass computes the scores anew, and again for these queries alone.
                    outputs.append(checkpoint(self._read, *given, use_reentrant=False))
                else:
                    outputs.append(self._read(*given))
        return torch.cat(outputs, dim=2).to(value.dtype), None

    def _read(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rank: Tensor,
        attention_mask: Tensor | None,
        head_mask: Tensor | None = None,
    ) -> Tensor:
        """The output of some queries `[B, H, C, D]`, the last of which is at the slot of the last key."""
        query, key, value = _wide(query), _wide(key), _wide(value)
        count, slots = query.shape[2], key.shape[2]
        slot = torch.arange(slots, device=query.device)
        distance = slot[slots - count :, None] - slot
        seen = (distance >= 0)[None, None]
        if attention_mask is not None:
            seen = seen & (attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0)
        exact = (distance < self.window) | self._is_kept(rank, seen & (distance >= self.window))
        near = query @ key.transpose(-1, -2)
        far = self._far(query, key) if self.num_splats else torch.full_like(near, -torch.inf)
        score = torch.where(exact, near, far)
        # The lowest finite number, because -inf would give NaN for padding that sees no key. Its output is 0.
        weights = score.masked_fill(~seen, torch.finfo(score.dtype).min).softmax(dim=-1).masked_fill(~seen, 0)
        weights = self.attn_dropout(weights)
        if head_mask is not None:
            weights = weights * head_mask
        return weights @ value

    def _far(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores through the splats, `[B, H, C, K]`."""

        def log_phi(x: Tensor) -> Tensor:  # [B, H, T, D] -> [B, H, T, S]
            # By differences: in the product |x|^2 - 2 x . c + |c|^2, large terms cancel.
            distance = torch.cdist(x, _wide(self.splat_centers), compute_mode="donot_use_mm_for_euclid_dist")
            return -(distance**2) / (2 * torch.exp(2 * _wide(self.splat_log_scales)))[:, None]

        through = log_phi(query)
        if self.splat_log_amplitudes is not None:
            through = through + _wide(self.splat_log_amplitudes)[:, None]
        far = torch.logsumexp(through[:, :, :, None] + log_phi(key)[:, :, None], dim=-1)
        if self.splat_norm_gain is not None:
            norms = _squared_norm(query)[..., None] + _squared_norm(key)[:, :, None]
            far = far + _wide(self.splat_norm_gain)[:, None, None] * norms
        if self.splat_far_gain is not None:
            far = far + _wide(self.splat_far_gain)[:, None, None]
        return far

    @torch.no_grad()
    def _rank(self, key: Tensor, value: Tensor) -> Tensor:
        """`[B, H, K]`: 0 for the most important key; of equals, the older one comes first."""
        importance = _squared_norm(key)
        if self.splat_importance is not None:
            weights = _wide(self.splat_importance)[:, None]
            of_key, of_value, of_norm = weights.split([self.head_dim, self.head_dim, 1], dim=-1)
            importance = (key * of_key).sum(-1) + (value * of_value).sum(-1) + of_norm[..., 0] * importance
        return importance.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)

    def _is_kept(self, rank: Tensor, far: Tensor) -> Tensor:
        """Which keys `[B, H, C, K]` each query keeps, of those that are far from it."""
        far = far.expand(*rank.shape[:2], *far.shape[2:])
        last = torch.iinfo(rank.dtype).max  # for keys that are not far
        first = torch.where(far, rank[:, :, None], last).topk(min(self.kept, rank.shape[-1]), largest=False).indices
        return far & torch.zeros_like(far).scatter(-1, first, True)


class GSAPreTrainedModel(GPTNeoPreTrainedModel):
    """What models with splats have in common."""

    config_class = GSAConfig
    _supports_flash_attn = False

    def _init_weights(self, module: nn.Module) -> None:
        """New splats: distinct centres, scales of 1, and terms that change nothing."""
        super()._init_weights(module)
        if not isinstance(module, GSASelfAttention):
            return
        for name, x in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name.startswith("splat_") and not getattr(x, "_is_hf_initialized", False):
                with torch.no_grad():
                    x.normal_() if name == "splat_centers" else x.zero_()
                    if name == "splat_importance":
                        x[:, -1] = 1

    def _keep_splats_in_float32(self) -> None:
        """Also in a model of 16 bits: they are small, and sigma is the exponential of a parameter."""
        names = {name.rpartition(".")[2] for name, _ in self.named_parameters()}
        self._keep_in_fp32_modules_strict = {name for name in names if name.startswith("splat_")}


class GSAModel(GSAPreTrainedModel, GPTNeoModel):
    """The model without a head, with `GSASelfAttention` in the layers that have splats."""

    def __init__(self, config: GSAConfig) -> None:
        super().__init__(config)
        block: Any
        for layer, block in enumerate(self.h):
            attention = DonorSelfAttention if config.layer_splats(layer) is None else GSASelfAttention
            block.attn.attention = attention(config, config.attention_layers[layer], layer)
        self._keep_splats_in_float32()
        self.post_init()


class GSAForCausalLM(GSAPreTrainedModel, GPTNeoForCausalLM):
    """The same with its head, which is tied to the token embedding."""

    def __init__(self, config: GSAConfig) -> None:
        super().__init__(config)
        self.transformer = GSAModel(config)
        self._keep_splats_in_float32()
        self.post_init()


def _wide(x: Tensor) -> Tensor:
    """In float32 at least, as scores and sums are in a model of 16 bits too."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _squared_norm(x: Tensor) -> Tensor:
    return (x**2).sum(dim=-1)
