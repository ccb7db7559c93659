"""Key-value memory of the embedded engine: one row a running game, kept over its turns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from archer_fast.attention import Layout, PackedLayout, branch_attention, causal_mask, check_no_window
from archer_fast.ops import slot_attention


class SlotCache:
    """Keys and values of `num_slots` running games; one pass appends any number of tokens a game.

    A game's tokens lie at positions 0..length-1 of its row; what lies behind is stale and masked, so a
    finished game's row is reused by writing over it. Rows grow by doubling up to `max_tokens`.
    On a GPU attention is `ops.slot_attention`, one kernel a layer; elsewhere a few plain products on a grid of games.
    """

    def __init__(self, num_layers: int, num_slots: int, max_tokens: int) -> None:
        self.num_slots = num_slots
        self.max_tokens = max_tokens
        self._keys: list[Tensor | None] = [None] * num_layers  # each [slots, g, capacity, d]
        self._values: list[Tensor | None] = [None] * num_layers

    @property
    def capacity(self) -> int:
        """Tokens a game for which there is room without another allocation."""
        return self._capacity_of(-1) if self._keys[-1] is not None else 0

    def pass_over(
        self, slot_ids: Tensor, position_ids: Tensor, rank: Tensor, width: int, end: int, num_pairs: int
    ) -> Layout:
        """The layout of one pass: token i goes to `position_ids[i]` of game `slot_ids[i]`.

        rank: [T] int64, the token's place among its game's new tokens, < width; end: 1 + largest position;
        num_pairs: the sum of 1 + position.
        """
        if end > self.max_tokens:
            raise ValueError(f"a game of {end} tokens does not fit the cache of max_tokens={self.max_tokens}")
        if slot_ids.is_cuda:
            return TokenPass(self, slot_ids, position_ids, end, num_pairs)
        return _SlotPass(self, slot_ids, position_ids, rank, width, end, num_pairs)

    def write(self, layer: int, slot_ids: Tensor, position_ids: Tensor, key: Tensor, value: Tensor, end: int) -> None:
        if self._keys[layer] is None or end > self._capacity_of(layer):
            self._grow(layer, key, end)
        self._keys[layer][slot_ids, :, position_ids] = key  # type: ignore[index]
        self._values[layer][slot_ids, :, position_ids] = value  # type: ignore[index]

    def stores(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [slots, g, capacity, d]."""
        return self._keys[layer], self._values[layer]  # type: ignore[return-value]

    def read(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [slots, g, end, d], views."""
        keys, values = self.stores(layer)
        return keys[:, :, :end], values[:, :, :end]

    def _capacity_of(self, layer: int) -> int:
        return self._keys[layer].shape[2]  # type: ignore[union-attr]

    def _grow(self, layer: int, like: Tensor, end: int) -> None:
        capacity = 64
        while capacity < end:
            capacity *= 2
        capacity = min(capacity, self.max_tokens)
        for store in (self._keys, self._values):
            new = torch.zeros(
                self.num_slots, like.shape[1], capacity, like.shape[2], dtype=like.dtype, device=like.device
            )
            old = store[layer]
            if old is not None:
                new[:, :, : old.shape[2]] = old
            store[layer] = new


class TokenPass:
    """One packed pass over the new tokens of some games, each attending to its own row by the kernel for tokens."""

    def __init__(self, cache: SlotCache, slot_ids: Tensor, position_ids: Tensor, end: int, num_pairs: int) -> None:
        self.cache, self.slot_ids, self.position_ids, self.end = cache, slot_ids, position_ids, end
        self.num_pairs = num_pairs

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        _check_window(window, self.end)
        self.cache.write(layer, self.slot_ids, self.position_ids, key, value, self.end)
        keys, values = self.cache.stores(layer)
        return slot_attention(query, keys, values, self.slot_ids, self.position_ids, scale)


class _SlotPass:
    """One packed pass over the new tokens of some games, each attending to its own row of the cache."""

    # Games that bring more than this many new tokens (a long prompt) attend apart, so that the
    # query grid of everyone else stays narrow.
    WIDE = 8

    def __init__(
        self,
        cache: SlotCache,
        slot_ids: Tensor,
        position_ids: Tensor,
        rank: Tensor,
        width: int,
        end: int,
        num_pairs: int,
    ) -> None:
        self.cache, self.slot_ids, self.position_ids, self.end = cache, slot_ids, position_ids, end
        self.rank, self.num_pairs = rank, num_pairs
        self._groups: list[tuple[Tensor | None, Tensor | None, Tensor, Tensor, int]] = []
        if width <= self.WIDE:
            self._add_group(None, None, slot_ids, cache.num_slots, width)
        else:
            counts = torch.zeros(cache.num_slots, dtype=torch.int64, device=rank.device)
            counts = counts.scatter_reduce(0, slot_ids, rank + 1, "amax")
            for wide in (False, True):
                slots = ((counts > self.WIDE) if wide else (counts > 0) & (counts <= self.WIDE)).nonzero().squeeze(1)
                if slots.numel():
                    row_of_slot = torch.full_like(counts, -1)
                    row_of_slot[slots] = torch.arange(slots.numel(), device=slots.device)
                    tokens = (row_of_slot[slot_ids] >= 0).nonzero().squeeze(1)
                    rows = row_of_slot[slot_ids[tokens]]
                    self._add_group(tokens, slots, rows, slots.numel(), int(counts[slots].max()))

    def _add_group(self, tokens: Tensor | None, slots: Tensor | None, rows: Tensor, num_rows: int, width: int) -> None:
        """tokens of this group (None: all) sit at query grid [rows, rank]; slots: cache rows (None: all)."""
        rank = self.rank if tokens is None else self.rank[tokens]
        position = self.position_ids if tokens is None else self.position_ids[tokens]
        grid = rows * width + rank  # token -> flat place in [num_rows, width]
        query_position = torch.zeros(num_rows * width, dtype=position.dtype, device=position.device)
        query_position[grid] = position
        hidden_keys = torch.arange(self.end, device=position.device) > query_position.view(num_rows, 1, 1, width, 1)
        self._groups.append((tokens, slots, grid, hidden_keys, num_rows))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        _check_window(window, self.end)
        self.cache.write(layer, self.slot_ids, self.position_ids, key, value, self.end)
        keys, values = self.cache.read(layer, self.end)
        out = query if len(self._groups) == 1 else torch.empty_like(query)
        for tokens, slots, grid, hidden_keys, num_rows in self._groups:
            k, v = (keys, values) if slots is None else (keys[slots], values[slots])
            q = query if tokens is None else query[tokens]
            attended = _grid_attention(q, k, v, grid, hidden_keys, num_rows, scale)
            if tokens is None:
                return attended
            out[tokens] = attended
        return out


def _check_window(window: int | None, num_tokens: int) -> None:
    if window is not None and window < num_tokens:
        raise ValueError(
            f"the embedded engine keeps no sliding window ({window} tokens) and this game has {num_tokens}; "
            "use a full-attention model or shorter games"
        )


def _grid_attention(
    query: Tensor, key: Tensor, value: Tensor, grid: Tensor, hidden_keys: Tensor, num_rows: int, scale: float
) -> Tensor:
    """query [t, h, d] placed at `grid` of [rows, width]; key, value [rows, g, L, d] -> [t, h, d].

    Plain matrix products, grouped by key-value head: on CPU faster than torch's masked
    scaled_dot_product_attention for one or two queries a row (.20 against .93 ms at 128 rows, L = 40, width 2).
    """
    h, d = query.shape[1:]
    g, width = key.shape[1], hidden_keys.shape[3]
    q = query.new_zeros(num_rows * width, h, d)
    q[grid] = query * scale
    q = q.view(num_rows, width, g, h // g, d).permute(0, 2, 3, 1, 4)  # [rows, g, h/g, width, d]
    scores = q.reshape(num_rows, g, -1, d) @ key.mT  # [rows, g, h/g * width, L]
    scores = scores.view(num_rows, g, h // g, width, -1).masked_fill(hidden_keys, -torch.inf)
    weights = scores.float().softmax(-1).to(value.dtype).view(num_rows, g, h // g * width, -1)
    out = (weights @ value).view(num_rows, g, h // g, width, d).permute(0, 3, 1, 2, 4)
    return out.reshape(num_rows * width, h, d)[grid]


class RecordingLayout:
    """A packed pass that keeps each layer's keys and values, for branches to continue from."""

    def __init__(self, packed: PackedLayout) -> None:
        self.packed = packed
        self.num_pairs = packed.num_pairs
        self.keys: list[Tensor] = []  # each [T, g, d]
        self.values: list[Tensor] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        assert layer == len(self.keys), "layers run in order"
        self.keys.append(key)
        self.values.append(value)
        return self.packed.attend(layer, query, key, value, scale, window)


_FIRST_TOKENS = 8  # of a branch, for which there is room at first


class BranchCache:
    """Decoding of R branches a game, one token a pass, over the game's recorded keys and values.

    A pass has a token of each branch that goes on; attention alone sees them on a grid [B, R] of games and branches.
    """

    num_pairs = 0  # where the branches begin the device knows: `sample_alternatives` counts them when all have ended

    def __init__(
        self,
        recorded: RecordingLayout,
        prefix_index: Tensor,
        prefix_mask: Tensor,
        branches: Tensor,
    ) -> None:
        """prefix_index [B, L] int64: recorded token at position l of game b; prefix_mask [B, R, L] bool;
        branches [k] int64, ascending: the places of the flattened [B, R] that are decoded."""
        # Heads first: what a decode step multiplies with, without copying it.
        self._prefix_keys = [k[prefix_index].transpose(1, 2).contiguous() for k in recorded.keys]  # each [B, g, L, d]
        self._prefix_values = [v[prefix_index].transpose(1, 2).contiguous() for v in recorded.values]
        self._prefix_mask = prefix_mask
        self._place = branches
        games, width = prefix_mask.shape[:2]
        own = [(games, width, _FIRST_TOKENS, k.shape[1], k.shape[3]) for k in self._prefix_keys]
        self._keys = [k.new_zeros(shape) for k, shape in zip(self._prefix_keys, own, strict=True)]
        self._values = [torch.zeros_like(k) for k in self._keys]
        self.step = 0

    def keep(self, branches: Tensor) -> None:
        """Go on with some branches alone: branches [k] int64, ascending, of those of the last pass."""
        if branches.numel() == self._place.numel():
            return
        self._place = place = self._place[branches]
        games, width = self._prefix_mask.shape[:2]
        game = place // width
        left, inverse, counts = torch.unique_consecutive(game, return_inverse=True, return_counts=True)
        if fewer := 2 * left.numel() <= games:  # else their keys are not worth copying
            games, game = left.numel(), inverse
        widest = int(counts.max())
        if not fewer and 2 * widest > width:
            return
        rank = torch.arange(place.numel(), device=place.device) - (counts.cumsum(0) - counts)[inverse]
        self._place = game * widest + rank
        source = place.new_zeros(games * widest)  # a place without a branch repeats another: nobody reads it
        source[self._place] = place
        moved = [x.flatten(0, 1)[source].unflatten(0, (games, widest)) for x in (*self._keys, *self._values)]
        self._keys, self._values = moved[: len(self._keys)], moved[len(self._keys) :]
        self._prefix_mask = self._prefix_mask.flatten(0, 1)[source].unflatten(0, (games, widest))
        if fewer:
            self._prefix_keys = [k[left] for k in self._prefix_keys]
            self._prefix_values = [v[left] for v in self._prefix_values]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        check_no_window(window, self._prefix_mask.shape[-1] + self.step + 1)
        games, width = self._prefix_mask.shape[:2]
        for store, new in ((self._keys, key), (self._values, value)):
            if self.step == store[layer].shape[2]:  # twice the room
                store[layer] = F.pad(store[layer], (0, 0, 0, 0, 0, self.step))
            store[layer].flatten(0, 1)[self._place, self.step] = new
        on_grid = query.new_zeros(games * width, *query.shape[1:]).index_copy_(0, self._place, query)
        end = self.step + 1
        out = branch_attention(
            on_grid.view(games, width, 1, *query.shape[1:]),
            self._prefix_keys[layer].transpose(1, 2),
            self._prefix_values[layer].transpose(1, 2),
            self._prefix_mask,
            self._keys[layer][:, :, :end],
            self._values[layer][:, :, :end],
            causal_mask(end, None, query.device)[-1:],
            scale,
        )
        return out.flatten(0, 2)[self._place]
