"""The orders in which the kernels stream a matrix, made once from the stored row-major bits, and back.

On the CPU a block is 16 rows (one lane each), a word 32 columns, a chunk 32 words:
signs become int32 [planes, chunk, block, word of the chunk, 16 rows] flattened, so that a thread reads its share of a
chunk in one piece; scale and shift become […, block, G, 16]. Rows and columns beyond N and K are 0. Nothing is lost,
so that the stored form need not be kept beside it.

On the GPU signs become uint8 [planes, row tile, column tile, 32 lanes, 16 bytes], as a warp's matrix unit takes a tile of
16 rows and 256 columns: see kernels/common.cuh. A set bit is −1 there, and beyond N and K stands anything. Salient values
become packets there: uint8 [packets, 16], each of up to seven values of one row, one block of 256 columns and one group
of scales, so that a lane takes 16 bytes at a time and knows where all of them belong.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from signbit import bits

BLOCK_ROWS = 16
WORD_COLUMNS = 32
CHUNK_WORDS = 32
TILE_COLUMNS = 256


def lay_signs(signs: Tensor, in_features: int) -> Tensor:
    """Stored signs uint8 [planes, N, ceil(K/8)] in the kernels' order: int32, one dimension."""
    planes, rows, width = signs.shape
    blocks, words = -(-rows // BLOCK_ROWS), -(-in_features // WORD_COLUMNS)
    padded = F.pad(signs, (0, words * 4 - width, 0, blocks * BLOCK_ROWS - rows)).contiguous()
    rows_first = padded.view(torch.int32).reshape(planes, blocks, BLOCK_ROWS, words)
    out = torch.empty(planes, words * blocks * BLOCK_ROWS, dtype=torch.int32, device=signs.device)
    for start, count, piece in _chunks(words, blocks):
        chunk = rows_first[..., start : start + count].transpose(2, 3)  # [planes, blocks, count, 16]
        out[:, piece].view(planes, blocks, count, BLOCK_ROWS).copy_(chunk)
    return out.view(-1)


def stored_signs(laid: Tensor, planes: int, rows: int, in_features: int) -> Tensor:
    """The inverse of `lay_signs`."""
    blocks, words = -(-rows // BLOCK_ROWS), -(-in_features // WORD_COLUMNS)
    out = torch.empty(planes, blocks, BLOCK_ROWS, words, dtype=torch.int32, device=laid.device)
    for start, count, piece in _chunks(words, blocks):
        chunk = laid.view(planes, -1)[:, piece].view(planes, blocks, count, BLOCK_ROWS)
        out[..., start : start + count].copy_(chunk.transpose(2, 3))
    stored = out.view(planes, blocks * BLOCK_ROWS, words).view(torch.uint8)
    return stored[:, :rows, : -(-in_features // 8)].contiguous()


# Rows of a tile are 8r + g, its columns 32p + 16h + 4t + b; a lane is 4g + t and bit p of byte b of its word 2h + r.
_TILE = ("planes", "blocks", "r", "g", "tiles", "p", "h", "t", "b")
_LAID = ("planes", "blocks", "tiles", "g", "t", "h", "r", "b", "p")
_AT_A_TIME = 64 * BLOCK_ROWS  # rows: unpacked, a bit takes a byte and more
_SIZES = {"r": 2, "g": 8, "p": 8, "h": 2, "t": 4, "b": 4}


def lay_tiles(signs: Tensor, in_features: int) -> Tensor:
    """Stored signs uint8 [planes, N, ceil(K/8)] in the order of the GPU's kernels: uint8, one dimension."""
    planes, rows, width = signs.shape
    blocks, tiles = -(-rows // BLOCK_ROWS), -(-in_features // TILE_COLUMNS)
    padded = F.pad(signs, (0, tiles * TILE_COLUMNS // 8 - width, 0, blocks * BLOCK_ROWS - rows))
    pieces = []
    for piece in padded.split(_AT_A_TIME, dim=1):
        sizes = {**_SIZES, "planes": planes, "blocks": piece.shape[1] // BLOCK_ROWS, "tiles": tiles}
        negative = bits.unpack_bits(piece, tiles * TILE_COLUMNS, dtype=torch.uint8) == 0
        tile = negative.reshape([sizes[name] for name in _TILE])
        pieces.append(bits.pack_signs(tile.permute([_TILE.index(name) for name in _LAID])))
    return torch.cat(pieces, dim=1).view(-1)


def stored_tiles(laid: Tensor, planes: int, rows: int, in_features: int) -> Tensor:
    """The inverse of `lay_tiles`."""
    blocks, tiles = -(-rows // BLOCK_ROWS), -(-in_features // TILE_COLUMNS)
    pieces = []
    for piece in laid.view(planes, blocks, -1).split(_AT_A_TIME // BLOCK_ROWS, dim=1):
        sizes = {**_SIZES, "planes": planes, "blocks": piece.shape[1], "tiles": tiles}
        negative = bits.unpack_bits(piece.reshape(-1, 1), 8, dtype=torch.uint8)
        tile = negative.reshape([sizes[name] for name in _LAID]).permute([_LAID.index(name) for name in _TILE])
        positive = tile.reshape(planes, -1, tiles * TILE_COLUMNS)[..., :in_features] == 0
        pieces.append(bits.pack_signs(positive))
    return torch.cat(pieces, dim=1)[:, :rows].contiguous()


_IN_PACKET = 7
# Bytes 0 and 1: block + 4096·(how many); then of each value its column in the block, and its code.
_COLUMN_BYTES, _CODE_BYTES = (4, 5, 6, 7, 2, 3, 15), (8, 9, 10, 11, 12, 13, 14)


def lay_packets(index: Tensor, codes: Tensor, rows: int, in_features: int, width: int) -> tuple[Tensor, Tensor]:
    """Salient values as packets uint8 [packets, 16], and how many lie before each row: int32 [N + 1].

    `index` int64 [count] are their places in the flattened [N, K] matrix, ascending; `codes` [count] are below 256; a scale
    holds for `width` columns. Missing values of a packet stand in the column of its first, with code 0.
    """
    row, column = index // in_features, index % in_features
    block, group = column // TILE_COLUMNS, column // width
    run = (row * (-(-in_features // TILE_COLUMNS)) + block) * (in_features // width) + group
    _, run, length = torch.unique_consecutive(run, return_inverse=True, return_counts=True)
    in_run = torch.arange(len(index), device=index.device) - (length.cumsum(0) - length)[run]
    packets_of_run = -(-length // _IN_PACKET)
    packet = (packets_of_run.cumsum(0) - packets_of_run)[run] + in_run // _IN_PACKET
    first = in_run % _IN_PACKET == 0
    held = (length[run] - in_run)[first].clamp(max=_IN_PACKET)
    laid = torch.zeros(len(held), 16, dtype=torch.uint8, device=index.device)
    head = block[first] + 4096 * held
    laid[:, 0], laid[:, 1] = head % 256, head // 256
    at = [torch.tensor(places, device=index.device) for places in (_COLUMN_BYTES, _CODE_BYTES)]
    in_block = (column % TILE_COLUMNS).to(torch.uint8)
    laid[:, at[0]] = in_block[first][:, None]
    laid[packet, at[0][in_run % _IN_PACKET]] = in_block
    laid[packet, at[1][in_run % _IN_PACKET]] = codes.to(torch.uint8)
    starts = torch.zeros(rows + 1, dtype=torch.int32, device=index.device)
    starts[1:] = torch.bincount(row[first], minlength=rows).cumsum(0)
    return laid, starts


def stored_packets(laid: Tensor, starts: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """The inverse of `lay_packets`: index int64 [count] and codes int32 [count]."""
    head = laid[:, 0].long() + 256 * laid[:, 1].long()
    rows = torch.arange(len(starts) - 1, device=laid.device)
    row = rows.repeat_interleave(starts.diff().long(), output_size=len(laid))
    held = torch.arange(_IN_PACKET, device=laid.device) < (head // 4096)[:, None]
    column = (head % 4096 * TILE_COLUMNS)[:, None] + laid[:, list(_COLUMN_BYTES)]
    return (row[:, None] * in_features + column)[held], laid[:, list(_CODE_BYTES)][held].to(torch.int32)


def lay_rows(values: Tensor) -> Tensor:
    """A scale or shift [..., N, G] as [..., block, G, 16]."""
    *lead, rows, groups = values.shape
    blocks = -(-rows // BLOCK_ROWS)
    padded = F.pad(values, (0, 0, 0, blocks * BLOCK_ROWS - rows))
    return padded.reshape(*lead, blocks, BLOCK_ROWS, groups).transpose(-1, -2).contiguous()


def stored_rows(laid: Tensor, rows: int) -> Tensor:
    """The inverse of `lay_rows`."""
    *lead, blocks, groups, lanes = laid.shape
    return laid.transpose(-1, -2).reshape(*lead, blocks * lanes, groups)[..., :rows, :].contiguous()


def _chunks(words: int, blocks: int) -> list[tuple[int, int, slice]]:
    """First word, number of words, and where the chunk's int32s lie in a plane."""
    pieces = []
    for start in range(0, words, CHUNK_WORDS):
        count = min(CHUNK_WORDS, words - start)
        begin = start * blocks * BLOCK_ROWS
        pieces.append((start, count, slice(begin, begin + count * blocks * BLOCK_ROWS)))
    return pieces
