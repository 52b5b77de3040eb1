#!/usr/bin/env python3
"""Breaks one line of a kernel at a time and shows who notices, in kernels/mutants.txt.

scripts/mutants.py [KERNEL...]   runs all mutants, or those of some kernels, and writes their rows
scripts/mutants.py --check       runs nothing; fails if a mutant's text is no longer in its kernel, or the table lacks its row

Each mutant replaces a piece of text, is built into a copy of the emulator's libraries, and runs the kernel's own tests:
the plain ones (results and schedules) and the race ones. A mutant that nobody catches makes the script fail.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "kernels/mutants.txt"

# Of each kernel: the tests in plain and in race mode.
ATTENTION = ["attention::matches_the_cpu", "attention::groups", "attention::parts", "attention::atomic_backward_matches"], ["attention::has_no_races", "attention::merging", "attention::atomic_backward_has"]
TESTS = {
    "attention_forward": ATTENTION,
    "attention_backward": ATTENTION,
    "attention_forward_wgmma": (["attention::wgmma_matches"], ["attention::wgmma_has"]),
    "head": (["head::matches_the_cpu", "head::losses"], ["head::has_no_races"]),
    "elementwise": (["elementwise::matches_the_cpu"], ["elementwise::has_no_races"]),
    "adam": (["elementwise::adam_matches"], ["elementwise::adam_has"]),
    "scale_embedding": (["elementwise::scale_embedding_matches"], ["elementwise::scale_embedding_has"]),
    "cox": (["cox::matches_the_cpu", "cox::blocks_take"], ["cox::has_no_races"]),
    "ppeg": (["ppeg::matches_the_cpu", "ppeg::problems_share_launches", "ppeg::a_part_takes_several_tiles"], ["ppeg::has_no_races"]),
    "conv_fusion": (
        ["conv_fusion::squares_match_the_cpu", "conv_fusion::sequences_match_the_cpu", "conv_fusion::single_streams_match_the_cpu", "conv_fusion::a_part_takes_several_tiles"],
        ["conv_fusion::has_no_races"],
    ),
    "matmul": (["matmul::matches_the_cpu", "matmul::large_tiles", "matmul::fragments"], ["matmul::has_no_races"]),
    "matmul_wgmma": (["matmul::wgmma_matches"], ["matmul::wgmma_has"]),
    "layer_norm": (["layer_norm::matches_the_cpu", "layer_norm::apply_and_in_place"], ["layer_norm::has_no_races"]),
}

# Kernel (and the header, if the text is there), what is broken, the text (its first occurrence, or the n-th after #n), what takes its place.
MUTANTS = [
    ("attention_forward", "forward: the first tiles are not waited for", "cp_async_wait<0>();", "cp_async_wait<1>();"),
    ("attention_forward", "forward: no __syncthreads", "__syncthreads();  // tile j", ";  // tile j"),
    ("attention_forward", "forward: __syncwarp instead of __syncthreads", "__syncthreads();  // tile j", "__syncwarp();  // tile j"),
    ("attention_forward", "forward: the first tiles are not committed", "cp_async_commit();", ""),
    ("attention_forward", "forward: later tiles are not committed", "cp_async_commit();#1", ""),
    ("attention_forward", "forward: keys land in the stage that is read", "keys + (stage ^ 1) * kN * D", "keys + stage * kN * D"),
    ("attention_forward", "forward: values land in the stage that is read", "values + (stage ^ 1) * kN * D", "values + stage * kN * D"),
    ("attention_forward", "forward: the tile's last keys are not masked", "if ((j + 1) * kN > m) mask", "if (false) mask"),
    ("attention_forward/attention_forward.cuh", "forward: one key too many", "+ e % 2 >= left) s[c][e]", "+ e % 2 > left) s[c][e]"),
    ("attention_forward/attention_forward.cuh", "forward: the largest score of a pair of threads alone", "high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));", ";"),
    ("attention_forward/attention_forward.cuh", "forward: the sum does not shrink", "sum[h] = sum[h] * shrink + part;", "sum[h] = sum[h] + part;"),
    ("attention_forward/attention_forward.cuh", "forward: the output does not shrink", "out[c][2 * h + 1] *= factor;", ";"),
    ("attention_forward/attention_forward.cuh", "forward: the sum of a pair of threads alone", "total += __shfl_xor_sync(0xffffffffu, total, 2);", ";"),
    ("attention_forward/attention_forward.cuh", "forward: every head draws the same", "dropout.site += uint32_t(place.head);", ";"),
    ("attention_forward/attention_forward.cuh", "forward: rows g + 8 draw as rows g", "dropout_fragment(dropout, uint32_t(row + 8 * h)", "dropout_fragment(dropout, uint32_t(row)"),
    ("attention_forward", "forward: every tile draws the first's", "row, h, j * (kN / 32))", "row, h, 0)"),
    ("attention_forward/attention_forward.cuh", "forward: no row guard", "if (i >= n) continue;", ""),
    ("attention_forward/attention_forward.cuh", "forward: no column guard", "if (column >= head_dim) break;", ""),
    ("attention_forward/attention_forward.cuh", "forward: no keys divide by nothing", "total > 0.f ? 1.f / total : 0.f", "1.f / total"),
    ("attention_forward", "forward: queries on their way when the block ends", "cp_async_wait<0>();  // where there are no keys", ";  // where there are no keys"),
    ("attention_forward/attention_forward.cuh", "forward: a split begins at the first tile", "min(split * each, all)", "0"),
    ("attention_forward/attention_forward.cuh", "forward: a split goes on to the last tile", "end = min(begin + each, all)", "end = all"),
    ("attention_forward/attention_forward.cuh", "forward: splits share their place", "(int64_t(work.split) * n + i) * p.q.cols", "int64_t(i) * p.q.cols"),
    ("attention_forward/attention_forward.cuh", "forward: splits share their log-sum-exp", "p.part_lse + int64_t(work.split) * p.heads * n", "p.part_lse"),
    ("attention_forward", "join: no row guard", "if (p.splits == 1 || row >= n) return;", "if (p.splits == 1) return;"),
    ("attention_forward", "join: last split forgotten", "for (int s = 0; s < p.splits; s++) {", "for (int s = 0; s < p.splits - 1; s++) {"),
    ("attention_forward", "join: weights from the first head", "const int head = column / head_dim;", "const int head = 0;"),
    ("attention_forward", "join: every column writes lse of its head", "if (column % head_dim == 0) p.lse[at]", "if (column % 2 == 1) p.lse[at]"),
    ("attention_forward", "merge: no row guard", "if (row >= n) return;", ""),
    ("attention_forward", "merge: reads what nothing has written", "if (a > 0.f) out = load<2>", "out = load<2>"),
    ("attention_forward", "merge: the first part counts what was there", "p.first ? -INFINITY : p.lse[at]", "p.lse[at]"),
    ("attention_forward", "merge: no keys at all", "highest == -INFINITY ? 0.f : highest", "highest"),
    ("attention_forward", "merge: writes lse while others read it", "__syncwarp();  // all lanes have read lse\n    if (lane == 0) p.lse[at]", "if (lane == 31) p.lse[at]"),
    ("attention_forward", "merge: the weights are not normalised", "* float(part.v[e])) * inverse", "* float(part.v[e]))"),
    ("attention_forward_wgmma", "forward: the first tiles are not waited for", "cp_async_wait<1>();", "cp_async_wait<2>();"),
    ("attention_forward_wgmma", "forward: the first tiles are not committed", "cp_async_commit();", ""),
    ("attention_forward_wgmma", "forward: the second tiles are not committed", "cp_async_commit();#1", ""),
    ("attention_forward_wgmma", "forward: later tiles are not committed", "cp_async_commit();#2", ""),
    ("attention_forward_wgmma", "forward: no fence.proxy.async for the first tiles", "fence_proxy_async();", ""),
    ("attention_forward_wgmma", "forward: no fence.proxy.async for later tiles", "fence_proxy_async();#1", ""),
    ("attention_forward_wgmma", "forward: no fence.proxy.async for the last values", "fence_proxy_async();#2", ""),
    ("attention_forward_wgmma", "forward: no __syncthreads behind the first tiles", "__syncthreads();", ""),
    ("attention_forward_wgmma", "forward: no __syncthreads in the loop", "__syncthreads();  // values", ";  // values"),
    ("attention_forward_wgmma", "forward: a warpgroup's barrier instead of __syncthreads", "__syncthreads();  // values", "named_barrier_sync(1 + int(threadIdx.x) / 128, 128);  // values"),
    ("attention_forward_wgmma", "forward: no __syncthreads before the last values", "__syncthreads();  // the last", ";  // the last"),
    ("attention_forward_wgmma", "forward: later tiles are not waited for", "cp_async_wait<0>();", "cp_async_wait<1>();"),
    ("attention_forward_wgmma", "forward: the last values are not waited for", "cp_async_wait<0>();#1", ";"),
    ("attention_forward_wgmma", "forward: values land in the stage that is read", "load_tiles(values, work.v, stage ^ 1, j + 1);", "load_tiles(values, work.v, stage, j + 1);"),
    ("attention_forward_wgmma", "forward: keys land in the stage that is read", "load_tiles(keys, work.k, stage, j + 2);", "load_tiles(keys, work.k, stage ^ 1, j + 2);"),
    ("attention_forward_wgmma", "forward: keys of the next tile again", "load_tiles(keys, work.k, stage, j + 2);", "load_tiles(keys, work.k, stage, j + 1);"),
    ("attention_forward_wgmma", "forward: no wgmma.fence before scores", "wgmma_fence();", ""),
    ("attention_forward_wgmma", "forward: no wgmma.fence before sums", "wgmma_fence();#1", ""),
    ("attention_forward_wgmma", "forward: scores are not committed", "wgmma_commit();", ""),
    ("attention_forward_wgmma", "forward: sums are not committed", "wgmma_commit();#1", ""),
    ("attention_forward_wgmma", "forward: the first scores are not waited for", "wgmma_wait<0>(s);", ""),
    ("attention_forward_wgmma", "forward: scores are not waited for", "wgmma_wait<1>(s);", ""),
    ("attention_forward_wgmma", "forward: scores are waited for as if they were alone", "wgmma_wait<1>(s);", "wgmma_wait<2>(s);"),
    ("attention_forward_wgmma", "forward: sums are not waited for", "wgmma_wait<0>(out);", ""),
    ("attention_forward_wgmma", "forward: the last sums are not waited for", "wgmma_wait<0>(out);#1", ""),
    ("attention_forward_wgmma", "forward: scores add to those of the tile before", "keys, 0, k), k > 0)", "keys, 0, k), true)"),
    ("attention_forward_wgmma", "forward: warpgroups share queries", "int(threadIdx.x) / 128 * 64;", "0;"),
    ("attention_forward_wgmma", "forward: the tile's last keys are not masked", "if ((j + 1) * kTileKeys > m) mask", "if (false) mask"),
    ("attention_forward_wgmma", "forward: the output does not shrink", "scale_row(out, h, shrink[h]);", ";"),
    ("attention_forward_wgmma", "forward: every tile draws the first's", "row, h, j * (kTileKeys / 32))", "row, h, 0)"),
    ("attention_forward_wgmma", "forward: weights of the tile before", "scale_row(out, h, shrink[h]);\n      take_weights();", "scale_row(out, h, shrink[h]);"),
    ("attention_forward_wgmma", "forward: values of the first keys again and again", "values, 0, 16 * step)", "values, 0, 0)"),
    ("attention_forward/attention.cuh", "place: the last problem is never found", "while (i + 1 < table.count &&", "while (i + 2 < table.count &&"),
    ("attention_forward/attention.cuh", "place: off by a block", "block >= table.problem[i + 1].first_block", "block > table.problem[i + 1].first_block"),
    ("attention_forward/attention.cuh", "head: the first one's columns", "m.data + int64_t(head) * head_dim", "m.data"),
    ("attention_forward/attention.cuh", "weigh: halves of a fragment swapped", "multiply_add(out[2 * j], as, bs[0], bs[1]);", "multiply_add(out[2 * j], as, bs[1], bs[0]);"),
    ("attention_backward", "dkv: tiles are not waited for", "cp_async_wait<0>();", "cp_async_wait<1>();"),
    ("attention_backward", "dkv: no __syncthreads", "__syncthreads();  // tile i", ";  // tile i"),
    ("attention_backward", "dkv: the only stage is overwritten in use", "__syncthreads();  // everyone has finished with the only stage", ";  //"),
    ("attention_backward", "dkv: lse of queries past the end", "cp_async4((thread < kM ? lses : deltas) + stage * kM + thread % kM, from + rows_of_head + (inside ? row : 0), inside);", "cp_async4((thread < kM ? lses : deltas) + stage * kM + thread % kM, from + rows_of_head + row, true);"),
    ("attention_backward", "dkv: lse of the first head", "const int64_t rows_of_head = int64_t(place.head) * n;", "const int64_t rows_of_head = 0;"),
    ("attention_backward", "dkv: every head draws the same", "dropout.site += uint32_t(place.head);", ";"),
    ("attention_backward", "dkv: draws of the tile in use are overwritten", "uint32_t* to = kept + (tile & 1) * kKept;", "uint32_t* to = kept;"),
    ("attention_backward", "dkv: every block draws the first keys'", "uint32_t(k0 / 32 * 4 + call)", "uint32_t(call)"),
    ("attention_backward", "dkv: a warp's draws for another", "(warp * 16 / 32 * 4 + g / 2) * kLine", "(g / 2) * kLine"),
    ("attention_backward", "dkv: halves of the draws swapped", "+ h) + g % 2) & 1u;", "+ h) + 1 - g % 2) & 1u;"),
    ("attention_backward", "dkv: delta forgotten", "(dp[c][2 * h + e] * factor - delta.v[e]);", "(dp[c][2 * h + e] * factor);"),
    ("attention_backward", "dkv: dk is not scaled", "first, dk, scale);", "first, dk, 1.f);"),
    ("attention_backward", "dkv: dropout forgotten in dv", "s[c][2 * h + e] = probability * factor;", "s[c][2 * h + e] = probability;"),
    ("attention_backward", "dkv: copies on their way at the end", "cp_async_wait<0>();#1", ""),
    ("attention_backward", "dkv: own keys are not committed", "cp_async_commit();#1", ""),
    ("attention_backward", "dq: own queries are not committed", "cp_async_commit();#3", ""),
    ("attention_backward", "dq: copies on their way at the end", "cp_async_wait<0>();#3", ""),
    ("attention_backward", "dq: tiles are not waited for", "cp_async_wait<0>();#2", "cp_async_wait<1>();"),
    ("attention_backward", "dq: no __syncthreads", "__syncthreads();  // tile j", ";  // tile j"),
    ("attention_backward", "dq: the only stage is overwritten in use", "__syncthreads();  // everyone has finished with the only stage#1", ";  //"),
    ("attention_backward", "dq: keys past the end count", "const bool outside = j * kN + 8 * c + 2 * t + e >= m;", "const bool outside = false;"),
    ("attention_backward", "dq: lse past the end is read", "if (own < n) {", "{"),
    ("attention_backward", "dq: every head draws the same", "dropout.site += uint32_t(place.head);#1", ";"),
    ("attention_backward", "dq: every tile draws the first's", "uint32_t(row + 8 * h), uint32_t(j), t, factors", "uint32_t(row + 8 * h), 0u, t, factors"),
    ("attention_backward", "dq: is not scaled", "0, dq, scale);", "0, dq, 1.f);"),
    ("attention_backward", "dqkv: dS is read before it is complete", "__syncthreads();  // dS is complete", ";"),
    ("attention_backward", "dqkv: dS over a tile of dout that is in use", "if (kStages<D> == 1) __syncthreads();  // everyone has finished with the tile of dout", ";"),
    ("attention_backward", "dqkv: keys past the end count", "const bool inside = k0 + key < p.k.rows;", "const bool inside = true;"),
    ("attention_backward", "dqkv: adds without atomics", "atomic_add_pair(sums + int64_t(query) * d + column, dq[j][2 * h], dq[j][2 * h + 1]);", "store<2>(sums + int64_t(query) * d + column, Pack<float, 2>{sums[int64_t(query) * d + column] + dq[j][2 * h], sums[int64_t(query) * d + column + 1] + dq[j][2 * h + 1]});"),
    ("attention_backward", "dqkv: no row guard", "if (query >= n) continue;", ""),
    ("attention_backward", "dqkv: no column guard", "if (column < head_dim) atomic_add_pair", "atomic_add_pair"),
    ("attention_backward", "dqkv: of the first head", "p.sums + place.head * head_dim", "p.sums"),
    ("attention_backward", "dqkv: every pass over the queries adds", "if (ADD_DQ && first == 0) {", "if (ADD_DQ) {"),
    ("attention_backward", "dqkv: every tile adds to the first queries", "head_dim, i * kM, ds, keys);", "head_dim, 0, ds, keys);"),
    ("attention_backward", "dqkv: half of the queries", "const int row0 = warp % 2 * 16", "const int row0 = 0"),
    ("attention_backward", "delta alone: sums are not cleared", "store<4>(p.sums + int64_t(row) * d + at, Pack<float, 4>{});", ""),
    ("attention_backward", "delta alone: no row guard", "if (row >= n) return;", ""),
    ("attention_backward", "delta alone: no column guard", "if (const int column = 4 * lane; column < head_dim) {", "{ const int column = 4 * lane;"),
    ("attention_backward", "delta alone: of the first head", "const int64_t at = head * head_dim + column;", "const int64_t at = column;"),
    ("attention_backward", "delta alone: of four columns", "delta = warp_sum(delta);", ""),
    ("attention_backward", "round: no row guard", "if (row >= p.q.rows) return;", ""),
    ("attention_backward", "round: is not scaled", "real(scale * sums.v[e])", "real(sums.v[e])"),
    ("attention_backward", "round: the first columns alone", "column < d; column += 4 * 32", "column < 4 * 32; column += 4 * 32"),
    ("attention_backward", "stores: no row guard", "if (row >= to.rows) continue;", ""),
    ("attention_backward", "stores: no column guard", "if (column < to.cols) store_pair", "store_pair"),
    ("attention_backward", "delta: no row guard", "if (own < n && t == 0) p.delta", "if (t == 0) p.delta"),
    ("attention_backward", "delta: of the first head", "p.dout.row(own) + offset + column", "p.dout.row(own) + column"),
    ("attention_backward", "delta: of a pair of threads alone", "delta[h] += __shfl_xor_sync(0xffffffffu, delta[h], 2);", ";"),
    ("head", "sum: shared memory still in use", "__syncthreads();  // `shared` may still be in use", ";"),
    ("head", "sum: other warps' parts are not there yet", "__syncthreads();\n  float sum = 0.f;\n  for (int w", "float sum = 0.f;\n  for (int w"),
    ("head", "sum: last warp forgotten", "for (int w = 0; w < kWarps; w++) sum", "for (int w = 0; w < kWarps - 1; w++) sum"),
    ("head", "forward: statistics forgotten", "p.stats[1] = stats.rstd;", ";"),
    ("head", "forward: bias forgotten", "logit + float(p.bias[i])", "logit"),
    ("head", "forward: one lane's logit", "logit = warp_sum(logit);", ";"),
    ("head", "forward: only the first classes", "i += kWarps) {\n    float logit", "i += 8 * kWarps) {\n    float logit"),
    ("head", "train: several threads", "if (threadIdx.x == 0) find_loss(", "find_loss("),
    ("head", "train: other warps' logits are not there yet", "__syncthreads();\n  if (threadIdx.x == 0) find_loss", "if (threadIdx.x == 0) find_loss"),
    ("head", "train: the loss's gradient is not there yet", "hazards, survival);\n  __syncthreads();", "hazards, survival);"),
    ("head", "loss: survival before the first bin", "y == 0 ? 1.0 : survival[y - 1]", "y == 0 ? 0.5 : survival[y - 1]"),
    ("head", "loss: small probabilities are not clamped", "log(p < kLeast ? kLeast : p)", "log(p)"),
    ("head", "loss: gradients below the clamp", "p < kLeast ? 0.0 : 1.0 / p", "1.0 / p"),
    ("head", "loss: censored as uncensored", "if (p.censored) {", "if (!p.censored) {"),
    ("head", "loss: the other loss", "} else if (!p.cross_entropy) {", "} else if (p.cross_entropy) {"),
    ("head", "loss: carry between classes forgotten", "carried *= 1.0 - hazards[t];", ";"),
    ("head", "loss: share forgotten", "float(p.share * dh", "float(dh"),
    ("head", "loss: risk of the other sign", "double(logits[0]) : -sum;", "double(logits[0]) : sum;"),
    ("head", "backward: no barrier behind dlogits", "__syncthreads();\n  go_back(p, {", "go_back(p, {"),
    ("head", "backward: bias gradient overwritten", "p.dbias[thread] += dlogits[thread];", "p.dbias[thread] = dlogits[thread];"),
    ("head", "backward: weight gradient overwritten", "p.dweight.row(i)[c] += dlogits[i]", "p.dweight.row(i)[c] = dlogits[i]"),
    ("head", "backward: the norm's second term forgotten", "- mean_g - x_hat * mean_gx", "- mean_g"),
    ("elementwise", "piece: quads cross rows", "(cols + 31) / 32 * 4;", "(cols + 7) / 8;"),
    ("elementwise", "map: no guard", "if (piece.row >= p.out.rows || piece.column >= p.out.cols) return;", ""),
    ("elementwise", "map: no column guard", "if (piece.row >= p.out.rows || piece.column >= p.out.cols) return;", "if (piece.row >= p.out.rows) return;"),
    ("elementwise", "map: dropout not scaled", "kept >> e & 1u ? p.dropout.scale : 0.f", "kept >> e & 1u ? 1.f : 0.f"),
    ("elementwise", "map: GELU forgotten", "if (p.gelu) v[e] *= normal_cdf(v[e]);", ""),
    ("elementwise", "map: the next row's draws", "dropout_kept_eight(p.dropout, uint32_t(piece.row)", "dropout_kept_eight(p.dropout, uint32_t(piece.row + 1)"),
    ("elementwise", "sum: terms past the last", "if (i >= p.terms) break;", ""),
    ("elementwise", "sum: last term forgotten", "if (i >= p.terms) break;", "if (i + 1 >= p.terms) break;"),
    ("elementwise", "sum: no guard", "if (piece.row >= p.out.rows || piece.column >= p.out.cols) return;#1", ""),
    ("elementwise", "accumulate: no guard", "if (piece.row >= x.rows || piece.column >= x.cols) return;", ""),
    ("elementwise", "accumulate: overwrites", "sum.v[e] += v[4 * half + e];", "sum.v[e] = v[4 * half + e];"),
    ("elementwise", "round: no guard", "if (piece.row >= out.rows || piece.column >= out.cols) return;", ""),
    ("elementwise", "round: the first half twice", "load<4>(from + 4 * half)", "load<4>(from)"),
    ("elementwise", "zero: no guard", "if (piece.row >= sums.rows || piece.column >= sums.cols) return;", ""),
    ("elementwise", "zero: half of a piece", "store<4>(to + 4, Pack<float, 4>{});", ";"),
    ("elementwise/dropout.cuh", "Philox: a round too few", "round < 7", "round < 6"),
    ("elementwise/dropout.cuh", "kept: pairs of the wrong thread", "(lane & ~3) + s) >> (2 * t)", "(lane & ~3) + s) >> (2 * s)"),
    ("adam", "no guard", "if (at >= a.n) return;", ""),
    ("adam", "decay forgotten", "grads.v[e] + a.decay * p.v[e]", "grads.v[e]"),
    ("adam", "second moment of the gradient itself", "(1.f - a.beta2) * g * g", "(1.f - a.beta2) * g"),
    ("adam", "bias correction forgotten", "sqrtf(v.v[e]) * a.unbias", "sqrtf(v.v[e])"),
    ("adam", "gradient kept", "store<4>(a.grads + at, Pack<float, 4>{});", ";"),
    ("adam", "weights forgotten", "if (sizeof(real) < 4) store<4>(a.weights + at, weights);", ";"),
    ("adam", "first moment forgotten", "store<4>(a.m + at, m);", ";"),
    ("scale_embedding", "forward: no row guard", "if (row >= p.weight.rows) return;", ""),
    ("scale_embedding", "forward: bias forgotten", "real(float(p.bias[row]) + sum)", "real(sum)"),
    ("scale_embedding", "forward: every lane writes its own sum", "sum = warp_sum(sum);", ";"),
    ("scale_embedding", "backward: no column guard", "const bool inside = column < p.weight.cols;", "const bool inside = true;"),
    ("scale_embedding", "backward: no barrier before the sum", "__syncthreads();\n    if (warp == 0", "if (warp == 0"),
    ("scale_embedding", "backward: no barrier behind it", "__syncthreads();  // the sums are free again", ";"),
    ("scale_embedding", "backward: last warp forgotten", "w < kWarps; w++", "w < kWarps - 1; w++"),
    ("scale_embedding", "backward: every block adds to the bias", "if (blockIdx.x == 0 && lane == 0) p.dbias", "if (lane == 0) p.dbias"),
    ("scale_embedding", "backward: weight's gradient overwritten", "p.dweight.row(row)[column] += g * e;", "p.dweight.row(row)[column] = g * e;"),
    ("scale_embedding", "backward: embedding's gradient overwritten", "p.dembedding[column] += total;", "p.dembedding[column] = total;"),
    ("matmul/matmul.cuh", "problem: the last one is never found", "i + 1 < table.count", "i + 2 < table.count"),
    ("matmul/matmul.cuh", "problem: off by a tile", "tile >= table.problem[i + 1].first_tile", "tile > table.problem[i + 1].first_tile"),
    ("matmul", "sum: last stage forgotten", "(end - begin + kDepth - 1) / kDepth;\n    for", "(end - begin) / kDepth;\n    for"),
    ("matmul", "sum: prologue not committed", "cp_async_commit();", ""),
    ("matmul", "sum: a stage too early", "cp_async_wait<kStages - 2>();", "cp_async_wait<kStages - 1>();"),
    ("matmul", "sum: no __syncthreads", "__syncthreads();  // stage s", ";  // stage s"),
    ("matmul", "sum: __syncwarp instead of __syncthreads", "__syncthreads();  // stage s", "__syncwarp();  // stage s"),
    ("matmul", "sum: overwrites the stage that is read", "const int next = at == 0 ? kStages - 1 : at - 1;", "const int next = at;"),
    ("matmul", "sum: stages not committed", "cp_async_commit();#1", ""),
    ("matmul", "sum: reads the first stage only", "at = at == kStages - 1 ? 0 : at + 1;", ";"),
    ("matmul", "multiply: warps share rows", "warp / WARPS_N * (16 * kM), n = warp", "0, n = warp"),
    ("matmul", "multiply: fragments of k in other orders", "load_b_columns<BN>(bs[j]", "load_b_t<BN>(bs[j]"),
    ("matmul", "multiply: halves of b swapped", "as, bs[j][2], bs[j][3]", "as, bs[j][0], bs[j][3]"),
    ("matmul/matmul.cuh", "exchange: one pair from the wrong thread", "v[4 + e] = t & 2 ? same_even : far_even;", "v[4 + e] = t & 2 ? far_even : same_even;"),
    ("matmul/matmul.cuh", "exchange: low for high", "t & 2 ? low : high, 2)", "t & 2 ? high : low, 2)"),
    ("matmul/matmul.cuh", "finish: no row guard", "if (row >= p.out.rows || column >= p.out.cols) continue;", "if (column >= p.out.cols) continue;"),
    ("matmul/matmul.cuh", "finish: no column guard", "if (row >= p.out.rows || column >= p.out.cols) continue;", "if (row >= p.out.rows) continue;"),
    ("matmul/matmul.cuh", "finish: what out held forgotten", "if (p.accumulate) {", "if (false) {"),
    ("matmul/matmul.cuh", "finish: bias forgotten", "if (p.bias) {", "if (false) {"),
    ("matmul/matmul.cuh", "finish: pre-activation not stored", "store_eight(p.pre.row(row) + column, v);", ";"),
    ("matmul/matmul.cuh", "finish: GELU's derivative for GELU", "v[e] *= normal_cdf(v[e])", "v[e] *= gelu_derivative(v[e])"),
    ("matmul/matmul.cuh", "finish: draws of the tile's first columns", "uint32_t(column0 / 32)", "uint32_t(column0 / 64 * 2)"),
    ("matmul/matmul.cuh", "finish: dropout of another row", "dropout_kept_eight(p.dropout, uint32_t(row)", "dropout_kept_eight(p.dropout, uint32_t(row + 1)"),
    ("matmul/matmul.cuh", "finish: not scaled", "keep >> e & 1u ? p.dropout.scale", "keep >> e & 1u ? 1.f"),
    ("matmul/matmul.cuh", "finish: residual forgotten", "if (p.residual.data) {", "if (false) {"),
    ("matmul/matmul.cuh", "finish: out's rows taken as contiguous", "store_eight(p.out.row(row) + column, v);", "store_eight(p.out.data + int64_t(row) * p.out.cols + column, v);"),
    ("matmul/matmul.cuh", "weight: a split takes part of a stage", "+ p.splits - 1) / p.splits * kDepth;", "+ p.splits - 1) * kDepth / p.splits;"),
    ("matmul/matmul.cuh", "weight: rows of the next split too", "end = min(begin + each, p.dy.rows)", "end = min(begin + each + kDepth, p.dy.rows)"),
    ("matmul", "weight: every column of tiles sums dy", "product.n0 == 0 && ", ""),
    ("matmul", "weight: no guard on db's rows", " && product.m0 + thread < part.p.dw.rows;", ";"),
    ("matmul/matmul.cuh", "weight: db overwritten", "p.db[row] += column_sum", "p.db[row] = column_sum"),
    ("matmul/matmul.cuh", "weight: db's partial sums over dw's", "partial[int64_t(p.dw.rows) * p.dw.cols + row] = column_sum", "partial[row] = column_sum"),
    ("matmul/matmul.cuh", "weight: splits share a partial sum", "p.partial + int64_t(split) *", "p.partial + int64_t(0) *"),
    ("matmul/matmul.cuh", "weight: no guard", "if (row >= p.dw.rows || column >= p.dw.cols) continue;", ""),
    ("matmul/matmul.cuh", "weight: overwrites dw", "if (part.alone) {\n        const", "if (false) {\n        const"),
    ("matmul", "reduce: one split too", "if (p.splits == 1) return;", ""),
    ("matmul", "reduce: no guard", "if (at >= each) return;", ""),
    ("matmul", "reduce: last split forgotten", "s < p.splits; s++", "s < p.splits - 1; s++"),
    ("matmul", "reduce: overwrites", "sum.v[e] += old.v[e];", "sum.v[e] += 0.f * old.v[e];"),
    ("matmul/tile.cuh", "load: no row guard", "row0 + row < from.rows && col0", "col0"),
    ("matmul/tile.cuh", "load: no column guard", "row0 + row < from.rows && col0 + col < from.cols", "row0 + row < from.rows"),
    ("matmul/tile.cuh", "swizzle of fragments: none", "((chunk ^ (row >> kShift)) & (kLine - 1)) * 16", "(chunk & (kLine - 1)) * 16"),
    ("matmul/tile.cuh", "swizzle: none", "((chunk ^ (row >> kShift)) & (kLine - 1))) * kChunk", "(chunk & (kLine - 1))) * kChunk"),
    ("matmul/tile.cuh", "TF32: small parts of a forgotten", "mma_tf32(c, small, big0, big1);", ";"),
    ("matmul/tile.cuh", "TF32: small parts of b forgotten", "mma_tf32(c, big, small0, small1);", ";"),
    ("matmul_wgmma", "sum: last stage forgotten", "(end - begin + kDepth - 1) / kDepth;\n    for", "(end - begin) / kDepth;\n    for"),
    ("matmul_wgmma", "sum: prologue not committed", "cp_async_commit();", ""),
    ("matmul_wgmma", "sum: a stage too early", "cp_async_wait<kStages - 2>();", "cp_async_wait<kStages - 1>();"),
    ("matmul_wgmma", "sum: no fence.proxy.async", "fence_proxy_async();", ""),
    ("matmul_wgmma", "sum: fence.proxy.async before the copies have landed", "cp_async_wait<kStages - 2>();\n      fence_proxy_async();", "fence_proxy_async();\n      cp_async_wait<kStages - 2>();"),
    ("matmul_wgmma", "sum: no __syncthreads", "__syncthreads();  // stage s", ";  // stage s"),
    ("matmul_wgmma", "sum: a warpgroup's barrier instead of __syncthreads", "__syncthreads();  // stage s", "named_barrier_sync(1 + int(threadIdx.x) / 128, 128);  // stage s"),
    ("matmul_wgmma", "sum: overwrites the stage that is read", "const int next = at == 0 ? kStages - 1 : at - 1;", "const int next = at;"),
    ("matmul_wgmma", "sum: stages not committed", "cp_async_commit();#1", ""),
    ("matmul_wgmma", "sum: reads the first stage only", "at = at == kStages - 1 ? 0 : at + 1;", ";"),
    ("matmul_wgmma", "sum: waits for the products a stage later", "wgmma_wait<0>(c);", "wgmma_wait<1>(c);"),
    ("matmul_wgmma", "sum: does not wait for the products", "wgmma_wait<0>(c);", ""),
    ("matmul_wgmma", "multiply: no wgmma.fence", "wgmma_fence();", ""),
    ("matmul_wgmma", "multiply: not committed", "wgmma_commit();", ""),
    ("matmul_wgmma", "multiply: warpgroups share rows", "int(threadIdx.x) / 128 * 64;", "0;"),
    ("matmul_wgmma", "multiply: the first rows of the depth again and again", "mn_major<kDepth>(stage + kTile, 0, k)", "mn_major<kDepth>(stage + kTile, 0, 0)"),
    ("matmul_wgmma", "multiply: b read as it lies for the other product", "LAYOUT == kForward ? kKMajor : kMnMajor>", "LAYOUT == kForward ? kMnMajor : kKMajor>"),
    ("matmul_wgmma", "pieces: 32 columns again and again", "each(c + 4 * j, m0", "each(c, m0"),
    ("matmul_wgmma", "weight: every column of tiles sums dy", "product.n0 == 0 && ", ""),
    ("matmul_wgmma", "weight: no guard on db's rows", " && product.m0 + thread < part.p.dw.rows;", ";"),
    ("matmul_wgmma/wgmma.cuh", "panels: all in the first one's place", "tile + ROWS * c, from", "tile, from"),
    ("matmul_wgmma/wgmma.cuh", "panels: columns of the first one", "row0, col0 + c)", "row0, col0)"),
    ("matmul_wgmma/wgmma.cuh", "panel_element: not swizzled", "swizzle<kPanel>(row, col % kPanel)", "row * kPanel + col % kPanel"),
    ("matmul_wgmma/wgmma.cuh", "k_major: the next eight lines too near", "16, 1024)", "16, 512)"),
    ("matmul_wgmma/wgmma.cuh", "mn_major: the next panel too near", "ROWS * kPanel * 2, 1024)", "ROWS * kPanel, 1024)"),
    ("matmul_wgmma/wgmma.cuh", "mn_major: the next eight lines too near", "ROWS * kPanel * 2, 1024)", "ROWS * kPanel * 2, 512)"),
    ("ppeg", "forward: the copy is not waited for", "cp_async_wait<0>();", ""),
    ("ppeg", "forward: no __syncthreads", "__syncthreads();", ""),
    ("ppeg", "forward: no column guard", "if (channel >= p.x.cols) return;", ""),
    ("ppeg", "forward: no token guard", "if (tile.has(row + r, col + c)) p.y", "if (true) p.y"),
    ("ppeg", "forward: one bias forgotten", " + float(p.biases[2][channel]);", ";"),
    ("ppeg", "load: no column guard", "token >= 0 && channel < x.cols", "token >= 0"),
    ("ppeg", "load: class token taken for the grid's", "x.row(first + token)", "x.row(token)"),
    ("ppeg", "rows before the grid forgotten", "row < first; row += kWarps", "row < 0; row += kWarps"),
    ("ppeg", "backward: no guard on the part and the group", "if (part >= step || channel0 >= p.x.cols) return;", ""),
    ("ppeg", "backward: the copy is not waited for", "cp_async_wait<0>();#1", ""),
    ("ppeg", "backward: no __syncthreads after the copy", "__syncthreads();#1", ""),
    ("ppeg", "backward: the window is not free", "__syncthreads();  // the window is free again", ""),
    ("ppeg", "backward: kernel not flipped", "merge<kTall, true>", "merge<kTall, false>"),
    ("ppeg", "backward: only the first tile", "t < tiles; t += step", "t < step; t += step"),
    ("ppeg", "backward: no column guard", "!tile.has(row, col) || channel >= p.x.cols", "!tile.has(row, col)"),
    ("ppeg", "backward: x beyond the grid counts", "tile.has(row + r, col + c) ? float(p.x.row(first + tile.token(row + r, col + c))[channel]) : 0.f", "float(p.x.row(first + tile.token(row + r, col + c))[channel])"),
    ("ppeg", "reduce: no guard", "if (i >= (Tiling<kTall>::kTaps + 1) * channels) return;", ""),
    ("ppeg", "reduce: overwrites the biases", "p.dbiases[b][channel] += total", "p.dbiases[b][channel] = total"),
    ("ppeg/depthwise.cuh", "border wraps into the next row", "col >= 0 && col < width", "true"),
    ("ppeg/depthwise.cuh", "merge: 5-tap kernel not centred", "tap / kWide - (TALL - kTall) / 2", "tap / kWide - (TALL - kTall) / 4"),
    ("ppeg/depthwise.cuh", "merge: no identity", "else if (tap == kTaps / 2) sum += 1.f;", ""),
    ("ppeg/depthwise.cuh", "merge: no column guard", "if (channel < channels) {", "{"),
    ("ppeg/depthwise.cuh", "partial: no __syncthreads", "__syncthreads();", ""),
    ("ppeg/depthwise.cuh", "partial: taps not turned back", "gradient.taps[kTaps - 1 - tap]", "gradient.taps[tap]"),
    ("ppeg/depthwise.cuh", "partial: no column guard", "if (first + lane >= channels) return;", ""),
    ("ppeg/depthwise.cuh", "partial: one warp's sums forgotten", "for (int w = 0; w < kWarps; w++)", "for (int w = 1; w < kWarps; w++)"),
    ("ppeg/depthwise.cuh", "unmerge: overwrites", "+ t] += value;", "+ t] = value;"),
    ("ppeg/depthwise.cuh", "sums take more than the launch gives", "kTile > kSums ? kTile : kSums", "kTile + kSums"),
    ("conv_fusion", "forward: w_0 outside the grid", "float mixed[kRealsPerPack] = {};\n    if (token >= 0 && channel < d) {", "float mixed[kRealsPerPack] = {};\n    for (float& m : mixed) m = mix.offset;\n    if (token >= 0 && channel < d) {"),
    ("conv_fusion", "forward: no column guard on the load", "token >= 0 && channel < d", "token >= 0"),
    ("conv_fusion", "forward: no __syncthreads", "__syncthreads();", ""),
    ("conv_fusion", "forward: pair not summed", " + __shfl_xor_sync(0xffffffffu, sums[r][c], 1)", ""),
    ("conv_fusion", "forward: both lanes of a pair write", "lane % 2 == 0 && channel < d", "channel < d"),
    ("conv_fusion", "forward: no column guard", "lane % 2 == 0 && channel < d && tile", "lane % 2 == 0 && tile"),
    ("conv_fusion", "forward: no token guard", "channel < d && tile.has(row + r, col + c)", "channel < d"),
    ("conv_fusion", "forward: no ReLU", "sum < 0.f ? 0.f : sum * factor", "sum * factor"),
    ("conv_fusion", "no dropout is all dropped", "dropout.threshold == 0 ? 1.f : dropout_factor(dropout, 0, uint32_t(j))", "dropout_factor(dropout, 0, uint32_t(j))"),
    ("conv_fusion", "backward: the factors are not there, the window not free", "__syncthreads();  // the factors are there, the window is free", ""),
    ("conv_fusion", "backward: no __syncthreads after the load", "__syncthreads();#2", ""),
    ("conv_fusion", "backward: gradient passes where nothing did", "float(out.v[e]) > 0.f ?", "true ?"),
    ("conv_fusion", "backward: no column guard on the load", "token >= 0 && j < p.out.cols", "token >= 0"),
    ("conv_fusion", "backward: w_0 forgotten", "mixed[r][c] = mix.offset;", ""),
    ("conv_fusion", "backward: no token guard", "if (!tile.has(row + r, col + c)) continue;\n          const int token", "const int token"),
    ("conv_fusion", "backward: mix sums without the warp", "warp_sum(dmix[s])", "dmix[s]"),
    ("conv_fusion", "backward: no __syncthreads before the sums", "__syncthreads();  // also: the window is free for the sums", ""),
    ("conv_fusion", "backward: groups share a mix partial", "int64_t(part) * gridDim.y + blockIdx.y", "int64_t(part) * gridDim.y"),
    ("conv_fusion", "single: weighed by a mix that is not there", "STREAMS == kStreams ? float(p.mix_weight[s]) : 1.f", "float(p.mix_weight[s])"),
    ("conv_fusion", "single: the mix's sums are written", "STREAMS == kStreams && int(threadIdx.x) <= kStreams", "int(threadIdx.x) <= kStreams"),
    ("conv_fusion", "single: the last block sums a mix", "STREAMS == kStreams && blockIdx.x == gridDim.x - 1", "blockIdx.x == gridDim.x - 1"),
    ("conv_fusion", "reduce: no guard", "if (i >= (T::kTaps + 1) * d) return;", ""),
    ("conv_fusion", "reduce: bias twice", "else if (channel % 2 == 0)", "else"),
    ("conv_fusion", "reduce: every lane adds the mix", "if (lane == 0) *(s < kStreams", "*(s < kStreams"),
    ("layer_norm", "forward: no row guard", "if (row >= n0) return;", ""),
    ("layer_norm", "forward: no guard on the repeated row", "if (row + n0 < p.y.rows) store", "store"),
    ("layer_norm", "forward: repeated row forgotten", "if (row + n0 < p.y.rows) store", "if (false) store"),
    ("layer_norm", "forward: every lane takes the whole row's sum", "int c = lane * V", "int c = 0"),
    ("layer_norm", "forward: reads a pack past the row", "c < d; c += 32 * V", "c < d + V; c += 32 * V"),
    ("layer_norm", "forward: no sum over the warp", "mean = warp_sum(sum) / float(d);", "mean = sum / float(d);"),
    ("layer_norm", "forward: statistics by every lane", "if (lane == 0) {", "{"),
    ("layer_norm", "forward: two warps write one row's statistics", "p.stats[2 * row] = mean;", "p.stats[2 * (row / 2)] = mean;"),
    ("layer_norm", "forward: warps share a row", "blockIdx.x) * kWarps + int(threadIdx.x) / 32;", "blockIdx.x) * kWarps + int(threadIdx.x) / 64;"),
    ("layer_norm", "backward: no guard on the block", "if (int(blockIdx.x) * kRowsPerBlock >= n0) return;", ""),
    ("layer_norm", "backward: no guard on a row's sums", "if (row >= n0) continue;", ""),
    ("layer_norm", "backward: no guard on a row's gradient", "if (row >= n0) break;", ""),
    ("layer_norm", "backward: the sum of one lane", "mean_gx[r] = warp_sum(mean_gx[r]) / float(d);", "mean_gx[r] = mean_gx[r] / float(d);"),
    ("layer_norm", "backward: no column guard", "if (c < d) {", "{"),
    ("layer_norm", "backward: lanes write over each other's columns", "sums[warp][1][e * kStride + lane] = dbias[e];", "sums[warp][1][e + lane] = dbias[e];"),
    ("layer_norm", "backward: warps write over each other's sums", "sums[warp][0][e * kStride + lane]", "sums[0][0][e * kStride + lane]"),
    ("layer_norm", "backward: no barrier behind them", "__syncthreads();  // the sums are free again", ";"),
    ("layer_norm", "backward: past the end of partial", "if (tile + column >= d) continue;", ""),
    ("layer_norm", "backward: dbias overwrites dweight's partial sums", "(2 * d) + half * d + tile + column", "(2 * d) + tile + column"),
    ("layer_norm", "backward: no guard on the repeated row", "row + n0 < p.dy.rows ? p.dy.row(row + n0) : nullptr", "p.dy.row(row + n0)"),
    ("layer_norm", "backward: repeated row forgotten", "row + n0 < p.dy.rows ? p.dy.row(row + n0) : nullptr", "nullptr"),
    ("layer_norm", "backward: no __syncthreads before the warps' sums are read", "__syncthreads();", ""),
    ("layer_norm", "backward: __syncwarp instead of __syncthreads", "__syncthreads();", "__syncwarp();"),
    ("layer_norm", "backward: barrier in half of the warps", "__syncthreads();", "if (warp < 4) __syncthreads();"),
    ("layer_norm", "backward: one warp's sums forgotten", "for (int w = 0; w < kWarps; w++)", "for (int w = 1; w < kWarps; w++)"),
    ("layer_norm", "reduce: no column guard", "if (c < 2 * d)\n", "if (true)\n"),
    ("layer_norm", "reduce: no __syncthreads", "__syncthreads();#2", ""),
    ("layer_norm", "reduce: every warp adds the total", "if (warp > 0 || c >= 2 * d) return;", "if (c >= 2 * d) return;"),
    ("layer_norm", "reduce: no column guard on the result", "if (warp > 0 || c >= 2 * d) return;", "if (warp > 0) return;"),
    ("layer_norm", "reduce: overwrites dweight", "p.dweight[c] += total;", "p.dweight[c] = total;"),
    ("cox", "highest: no sum over the warp", "highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, d));#1", ";"),
    ("cox", "highest: no __syncthreads", "__syncthreads();#3", ""),
    ("cox", "highest: one warp forgotten", "for (int w = 1; w < kThreads / 32; w++)", "for (int w = 2; w < kThreads / 32; w++)"),
    ("cox", "highest: every thread writes", "if (threadIdx.x > 0) return;\n  for (int w = 1", "for (int w = 1"),
    ("cox", "highest of all blocks: no __syncthreads", "__syncthreads();#2", ""),
    ("cox", "highest of all blocks: only the first", "i < blocks; i += kThreads) highest", "i < 1; i += kThreads) highest"),
    ("cox", "scan: lanes join the wrong way round", "mine = join(before, mine);", "mine = join(mine, before);"),
    ("cox", "scan: no lane guard", "if (lane >= d) mine", "mine"),
    ("cox", "scan: first lane keeps its own", "if (lane == 0) before = none<N>();", ""),
    ("cox", "scan: no __syncthreads before the warps' sums are read", "__syncthreads();", ""),
    ("cox", "scan: no __syncthreads before they are written again", "__syncthreads();  // `shared` may be used again", ""),
    ("cox", "scan: earlier warps forgotten", "for (int w = 0; w < warp; w++)", "for (int w = 1; w < warp; w++)"),
    ("cox", "scan: the total lacks the last warp", "for (int w = warp; w < kThreads / 32; w++)", "for (int w = warp; w < kThreads / 32 - 1; w++)"),
    ("cox", "join: a stratum's sum runs on", "k == 0 ? 1u : 2u", "k == 0 ? 0u : 2u"),
    ("cox", "join: a tie's sum runs on", "k == 0 ? 1u : 2u", "k == 0 ? 1u : 0u"),
    ("cox", "join: starts forgotten", "s.starts = before.starts | after.starts;", "s.starts = after.starts;"),
    ("cox", "blocks before: this one too", "const int blocks = int(blockIdx.x), each", "const int blocks = int(blockIdx.x) + 1, each"),
    ("cox", "risk sets: past the end", "place = begin + int(threadIdx.x); place < end", "place = begin + int(threadIdx.x); place < end + 1"),
    ("cox", "risk sets: rows of the next tile", "min(i + kRows, end), of), total, shared[0]);\n    all = join", "i + kRows, of), total, shared[0]);\n    all = join"),
    ("cox", "risk sets: carry between tiles forgotten", "before = join(before, total);", ";"),
    ("cox", "risk sets: every thread writes the total", "if (threadIdx.x == 0) write_total(p, all);", "write_total(p, all);"),
    ("cox", "Efron: ranks from 1", "- 1.0) / set[3]", ") / set[3]"),
    ("cox", "Efron: always", "p.efron ? (p", "true ? (p"),
    ("cox", "hazards: carry between tiles forgotten", "before = join(before, total);#1", ";"),
    ("cox", "hazards: log-likelihood without a barrier", "__syncthreads();#4", ""),
    ("cox", "hazards: one thread's log-likelihood forgotten", "for (int i = 1; i < kThreads; i++) loglik", "for (int i = 2; i < kThreads; i++) loglik"),
    ("cox", "gradient: hazard at the event's own place", "p.hazards + int64_t(p.last[place]) * 2", "p.hazards + int64_t(place) * 2"),
    ("cox", "gradient: events take the whole hazard", "event ? hazard[0] - hazard[1] : hazard[0]", "hazard[0]"),
    ("cox", "gradient: by place", "p.gradient[p.row(place)]", "p.gradient[place]"),
    ("cox", "gradient: weights forgotten", "(event ? p.weight(place) : 0.0)", "(event ? 1.0 : 0.0)"),
    ("cox", "gradient: one block's log-likelihood", "i < int(gridDim.x); i++) loglik", "i < 1; i++) loglik"),
    ("layer_norm", "reduce: last block forgotten", "(p.x.rows + kRowsPerBlock - 1) / kRowsPerBlock", "p.x.rows / kRowsPerBlock"),
]

# As in build.rs.
COMMON = "-std=c++20 -fPIC -fvisibility=hidden -ftls-model=initial-exec -fno-strict-aliasing -w -x c++ -c".split()
MODES = {
    "plain": ["-O2"],
    "race": "-O1 -g -DSIMT_RACE -fsanitize=thread,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined".split(),
}


def built():
    """The test binary and the folder with build.rs's objects."""
    command = "cargo test --release --features emulator --lib --no-run --message-format=json"
    lines = subprocess.run(command.split(), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    messages = [json.loads(line) for line in lines]
    test = next(m["executable"] for m in messages if m.get("target", {}).get("kind") == ["lib"] and m.get("profile", {}).get("test") and m.get("executable"))
    out = next(m["out_dir"] for m in messages if m["reason"] == "build-script-executed" and "CROSSFUSION_EMULATOR_BUILT" in dict(m["env"]))
    return test, Path(out)


def mutate(source, old, new):
    old, _, nth = old.partition("#")
    parts = source.split(old)
    nth = int(nth or 0)
    if len(parts) < nth + 2:
        sys.exit(f"no longer in the kernel: {old!r}")
    return old.join(parts[: nth + 1]) + new + old.join(parts[nth + 1 :])


def build(kernel, file, source, objects, folder):
    """The two libraries, with `source` in place of the kernel's file, or of a header that it includes."""
    for copied in [ROOT / f"kernels/{kernel}.cu", *(ROOT / "kernels").glob("*.cuh")]:  # a header includes its neighbours
        shutil.copy(copied, folder)
    (folder / file).write_text(source)
    compiler = os.environ.get("CXX", "c++")
    for mode, flags in MODES.items():
        mine = []
        for real in ("f32", "bf16"):
            mine.append(folder / f"{kernel}-{real}-{mode}.o")
            here = ["-I", ROOT / "kernels", f"-ffile-prefix-map={folder}/=kernels/", f"-ffile-prefix-map={ROOT}/="]
            subprocess.run([compiler, *COMMON, *flags, f"-DREAL={real}", *here, folder / f"{kernel}.cu", "-o", mine[-1]], check=True)
        others = [o for o in sorted(objects.glob(f"*-{mode}.o")) if o.name not in {m.name for m in mine}]
        library = folder / f"emulator-{mode}.so"
        subprocess.run([compiler, "-shared", "-pthread", "-o", library, *mine, *others, "-ldl"], check=True)


def noticed(test, filters, folder):
    """What the tests say against the mutant, or None."""
    environment = dict(os.environ, CROSSFUSION_EMULATOR=str(folder), RUST_BACKTRACE="0")
    command = [test, *(f"emulator_tests::{name}" for name in filters), "--test-threads=1"]
    try:
        done = subprocess.run(command, env=environment, timeout=300, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except subprocess.TimeoutExpired:
        return "hangs"
    if done.returncode == 0:
        return None
    text = done.stdout
    for pattern in (r"thread \d+: (.*)", r"(a kernel wrote outside[^\"]*)", r"\} (\w+: error .*)", r"(.* gives other bits)"):
        if found := re.search(pattern, text):
            # without addresses, folders of this machine, and the end of a quoted error
            return re.sub(r' 0x[0-9a-f]+|/\S*/(?=\w+\.cu)|"\)$', "", found[1])
    return f"crash ({done.returncode})" if done.returncode < 0 else "wrong result"


def caught(mutant, test, objects):
    """What the plain and the race tests say."""
    kernel, _, old, new = mutant
    kernel, _, header = kernel.partition("/")
    file = header or f"{kernel}.cu"
    with tempfile.TemporaryDirectory() as folder:
        build(kernel, file, mutate((ROOT / "kernels" / file).read_text(), old, new), objects, Path(folder))
        return [noticed(test, filters, Path(folder)) for filters in TESTS[kernel]]


def name_of(mutant):
    return f"{mutant[0]}: {mutant[1]}"


def rows():
    """The table: what the plain and the race tests say of each mutant."""
    found = re.findall(r"^(\S.*)\n    plain: (.*)\n    race:  (.*)\n", TABLE.read_text(), re.M)
    return {name: (plain, race) for name, plain, race in found}


def write(table):
    names = [name_of(m) for m in MUTANTS if name_of(m) in table]
    text = "".join(f"{name}\n    plain: {table[name][0]}\n    race:  {table[name][1]}\n" for name in names)
    alive = sum(table[name] == ("-", "-") for name in names)
    TABLE.write_text(text + f"{len(names) - alive} of {len(names)} caught\n")


def check():
    names = [name_of(m) for m in MUTANTS]
    if repeated := {name for name in names if names.count(name) > 1}:
        sys.exit(f"two mutants of one name: {repeated}")
    for kernel, _, old, new in MUTANTS:
        kernel, _, header = kernel.partition("/")
        mutate((ROOT / "kernels" / (header or f"{kernel}.cu")).read_text(), old, new)
    table = rows()
    if missing := [name for name in names if name not in table]:
        sys.exit(f"not in {TABLE.name}: {missing}")
    if alive := [name for name in names if table[name] == ("-", "-")]:
        sys.exit(f"nobody notices: {alive}")


def main():
    if sys.argv[1:] == ["--check"]:
        return check()
    if unknown := set(sys.argv[1:]) - set(TESTS):
        sys.exit(f"no mutants of {unknown}")
    mutants = [m for m in MUTANTS if m[0].partition("/")[0] in (sys.argv[1:] or TESTS)]
    test, objects = built()
    table = rows()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, found in zip(mutants, pool.map(lambda m: caught(m, test, objects), mutants)):
            table[name_of(mutant)] = tuple(text or "-" for text in found)
            print(name_of(mutant), *table[name_of(mutant)], sep="\n    ", flush=True)
    write(table)
    check()


if __name__ == "__main__":
    main()
