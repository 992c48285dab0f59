"""The planted defects: a piece of source that occurs once, what takes its place, which tests to ask."""

from __future__ import annotations

from typing import NamedTuple


class Defect(NamedTuple):
    file: str
    old: str
    new: str
    what: str
    tests: str  # arguments of pytest, below tests/


TRIE = "test_trie.py"
CORE = "test_core.py"
VALUES = "test_ops.py -k cpp"
GRADIENTS = "test_autograd.py -k cpp"
TRITON = "test_triton.py test_ops.py test_autograd.py -k triton"

DEFECTS = [
    # The trie
    Defect(
        "csrc/build.cpp",
        "static_cast<std::size_t>(key >> shift) & (buckets - 1)",
        "static_cast<std::size_t>(key) & (buckets - 1)",
        "the radix sort takes the lowest digit every time",
        TRIE,
    ),
    Defect(
        "csrc/build.cpp",
        "static_cast<std::uint64_t>(token - smallest + 1)",
        "static_cast<std::uint64_t>(token - smallest)",
        "off by one: padding sorts like the smallest token",
        TRIE,
    ),
    Defect(
        "csrc/build.cpp",
        "if (row[level] != -1) refuse(row, item, levels);",
        "if (row[level] < -1) refuse(row, item, levels);",
        "a token after the padding is accepted",
        TRIE,
    ),
    Defect(
        "csrc/build.cpp",
        "shared[rank] = depth;",
        "shared[rank] = std::min(depth, std::max(length - 1, 0));",
        "colliding items get a leaf each",
        TRIE,
    ),
    Defect(
        "gflowgr/trie.py",
        'if trie.fingerprint != metadata.get("fingerprint"):',
        "if not trie.fingerprint:",
        "a damaged file loads as another trie",
        TRIE,
    ),
    Defect(
        "gflowgr/trie.py",
        "save_file(arrays, temporary,",
        "save_file(arrays, path,",
        "the old file is overwritten in place",
        TRIE,
    ),
    Defect(
        "gflowgr/trie.py",
        "require((first_child[1:] >= first_child[:-1]).all(), ",
        "require((first_child[1:] >= 0).all(), ",
        "child ranges of a file may run backwards",
        TRIE,
    ),
    # Walking and the forward policy in C++
    Defect(
        "csrc/trie.hpp",
        "return found != end && *found == wanted ?",
        "return found != end ?",
        "a token off the trie takes the next larger sibling",
        f"{TRIE} -k walk",
    ),
    Defect(
        "csrc/trie.hpp",
        "return {token + first, first, first_child[node + 1] - first};",
        "return {token + first, first, first_child[node + 1] - first - (first_child[node + 1] - first > 2)};",
        "off by one in the child range: the last of three or more is left out",
        VALUES,
    ),
    Defect(
        "csrc/policy.hpp",
        "index % steps * step_stride",
        "index % steps * batch_stride",
        "a wrong stride",
        VALUES,
    ),
    Defect(
        "csrc/policy.hpp",
        "- first_token * token_stride;",
        "- first_token;",
        "a stride forgotten where the head's slice begins",
        VALUES,
    ),
    Defect(
        "csrc/policy.hpp",
        "return data + index / steps * batch_stride",
        "return data + static_cast<std::int32_t>(index / steps * batch_stride)",
        "32-bit offsets of rows",
        f"{CORE} -k 32_bits",
    ),
    Defect(
        "csrc/policy.hpp",
        "T* row = grad_logits + r * logits.width - logits.first_token;",
        "T* row = grad_logits + static_cast<std::int32_t>(r * logits.width) - logits.first_token;",
        "32-bit offsets of gradients",
        f"{CORE} -k 32_bits",
    ),
    Defect(
        "csrc/policy.hpp",
        "peak_ = largest(values_.data(), kids.count);",
        "peak_ = values_[0];",
        "the softmax is taken relative to the first child, not to the largest",
        VALUES,
    ),
    Defect(
        "csrc/policy.hpp",
        "kids.tokens[kids.count - 1] - lowest == kids.count - 1",
        "kids.tokens[kids.count - 1] - lowest >= kids.count - 1",
        "children with gaps between their tokens are read as if they had none",
        VALUES,
    ),
    Defect(
        "csrc/policy.hpp",
        "if (stride == 1 && kids",
        "if (kids",
        "columns with a stride are read as if they had none",
        VALUES,
    ),
    Defect(
        "csrc/exponentials.cpp",
        "parts[lane] += parts[lane + half];",
        "parts[lane] += half > 1 ? parts[lane + half] : 0;",
        "of the vector registers' partial sums one counts",
        VALUES,
    ),
    Defect(
        "csrc/exponentials.cpp",
        "p = p * r + 1.0f / 24.0f;",
        "p = p * r + 1.0f / 24.1f;",
        "a coefficient of the exponential is off by four in a thousand",
        GRADIENTS,
    ),
    Defect(
        "csrc/policy.hpp",
        "if (kids.count == 1) row[kids.tokens[0]] = 0;",
        "if (kids.count == 1) row[kids.tokens[0]] = widen(logits.row(r)[kids.tokens[0]]);",
        "a forced token has its logit for log-prob",
        VALUES,
    ),
    Defect(
        "csrc/policy.hpp",
        "row[token * grad.token_stride] - probability * total",
        "row[token * grad.token_stride] + probability * total",
        "a swapped sign in the gradient of the dense distribution",
        GRADIENTS,
    ),
    Defect(
        "csrc/policy.hpp",
        "total += row[kids.tokens[child] * grad.token_stride];",
        "total += row[kids.tokens[child]];",
        "grad_output is summed as if it were contiguous",
        GRADIENTS,
    ),
    Defect(
        "csrc/policy.hpp",
        "for (; t < steps && tokens[t] >= 0; ++t) {",
        "for (; t < steps && tokens[t] > 0; ++t) {",
        "token 0 counts as padding",
        VALUES,
    ),
    Defect(
        "csrc/policy.hpp",
        "if (next < 0 || kids.count < 2) return;",
        "if (next < 0) return;",
        "a forced step reads logits, and has a gradient where they are not finite",
        GRADIENTS,
    ),
    Defect(
        "csrc/policy.hpp",
        "const std::int64_t hit = next - kids.first;",
        "const std::int64_t hit = 0;",
        "the gradient is that of the first child, whichever was taken",
        GRADIENTS,
    ),
    # Sampling
    Defect(
        "csrc/policy.hpp",
        "exponentials_[child] = static_cast<S>((values_[child] - peak_) / temperature);",
        "exponentials_[child] = static_cast<S>(values_[child] - peak_);",
        "the temperature is ignored",
        VALUES,
    ),
    Defect(
        "csrc/policy.hpp",
        "log_prob = policy.log_prob(drawn);",
        "log_prob = policy.log_prob(drawn) / static_cast<S>(temperature);",
        "log-probs of draws are not those of temperature 1",
        VALUES,
    ),
    Defect(
        "csrc/policy.hpp",
        "return first_above(exponentials_.data(), count, uniform * total);",
        "return first_above(exponentials_.data(), count, uniform * uniform * total);",
        "draws lean towards the first children",
        VALUES,
    ),
    Defect(
        "gflowgr/ops/trie_sample.py",
        "        tokens.reshape(-1, 1),\n        nodes.reshape(-1),\n",
        "        tokens.reshape(-1, 1),\n        torch.zeros_like(nodes.reshape(-1)),\n",
        "the gradient of a draw is taken at the root",
        GRADIENTS,
    ),
    # Balances
    Defect(
        "csrc/balance.hpp",
        "if (mask == nullptr || mask[i]) total += log_probs[i];",
        "total += log_probs[i];",
        "a dropped mask",
        VALUES,
    ),
    Defect(
        "csrc/balance.hpp",
        "grad_log_probs[i] = mask == nullptr || mask[i] ? grad_residual[b] : S{0};",
        "grad_log_probs[i] = grad_residual[b];",
        "a dropped mask in the gradient",
        GRADIENTS,
    ),
    Defect(
        "csrc/balance.hpp",
        "log_z[b] + log_probability - log_rewards[b]",
        "log_z[b] - log_probability - log_rewards[b]",
        "a swapped sign in the residual",
        VALUES,
    ),
    Defect(
        "gflowgr/ops/trajectory_balance.py",
        "slope = 2 * residual if weights is None else 2 * weights * residual",
        "slope = 2 * residual",
        "weights count in the loss and not in its gradient",
        GRADIENTS,
    ),
    Defect(
        "gflowgr/ops/trajectory_balance.py",
        "return grad_log_probs, -grad, grad, None, None, None",
        "return grad_log_probs, grad, -grad, None, None, None",
        "the gradients of log R and log Z are swapped",
        GRADIENTS,
    ),
    # Flows
    Defect(
        "csrc/flows.hpp",
        "for (std::int64_t i = 0; i < ending; ++i) parts.push_back(rewards[own[i]]);",
        "for (std::int64_t i = 0; i < ending; ++i) parts.push_back(i < 1 ? rewards[own[i]] : -1e9f);",
        "of colliding items one counts",
        VALUES,
    ),
    Defect(
        "csrc/flows.hpp",
        "reaching[kids.first + i] += share(flows[kids.first + i]);",
        "reaching[kids.first + i] = share(flows[kids.first + i]);",
        "the own gradient of inner flows is lost",
        GRADIENTS,
    ),
    Defect(
        "csrc/flows.hpp",
        "logits.token_stride, log_flows + r / rows_per_flow * trie.nodes,",
        "logits.token_stride, log_flows + r / rows_per_flow,",
        "a wrong stride of the flows of a context",
        VALUES,
    ),
    Defect(
        "csrc/flows.hpp",
        "grad[r] * target * (log_target - log_policy - divergence)",
        "grad[r] * target * (log_target - log_policy)",
        "the target's own normalisation is missing in the gradient of flows",
        GRADIENTS,
    ),
    # Numbers, threads, backends
    Defect(
        "csrc/scalar.hpp",
        "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16",
        "(bits + 0x8000u) >> 16",
        "bfloat16 rounds ties away from zero",
        GRADIENTS,
    ),
    Defect(
        "csrc/scalar.hpp",
        "static_cast<float>(magnitude) * 0x1p-24f",
        "static_cast<float>(magnitude) * 0x1p-25f",
        "subnormal halves are read as half of what they are",
        GRADIENTS,
    ),
    Defect(
        "csrc/parallel.cpp",
        "body(count * index / parts, count * (index + 1) / parts);",
        "body(count * index / parts, count * (index + 1) / parts - (index + 1 < parts ? 1 : 0));",
        "a row between two threads' ranges is left out",
        f"{CORE} -k threads",
    ),
    Defect(
        "csrc/parallel.cpp",
        "pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });",
        "",
        "a forked worker waits for threads that only its parent has",
        f"{CORE} -k forked",
    ),
    Defect(
        "gflowgr/ops/_cpp.py",
        "    tokens, start = tokens.contiguous(), start.contiguous()\n    nodes = torch.empty_like(tokens)",
        "    start = start.contiguous()\n    nodes = torch.empty_like(tokens)",
        "tokens of any strides are handed over as if contiguous",
        f"{TRIE} -k walk",
    ),
    Defect(
        "gflowgr/ops/_checks.py",
        "if width is not None and trie.max_token >= width:",
        "if width is not None and trie.max_token > width:",
        "off by one in the vocabulary's size",
        f"{CORE} -k refuses",
    ),
    Defect(
        "gflowgr/ops/_registry.py",
        '    if backend == "auto":\n        return "torch"\n    raise',
        '    if backend != "":\n        return "torch"\n    raise',
        "a backend asked for by name falls back in silence",
        f"{CORE} -k backend",
    ),
    Defect(
        "gflowgr/ops/trie_linear_token_log_probs.py",
        "depth, rows, wanted[rows, depth : depth + 1], before[rows, depth], head, lowest[depth]",
        "depth, rows, wanted[rows, depth : depth + 1], nodes[rows, depth], head, lowest[depth]",
        "the level-sliced head stands one step ahead",
        VALUES,
    ),
    Defect(
        "gflowgr/ops/trie_linear_token_log_probs.py",
        "head = slice(lowest[depth] - first_token, highest[depth] + 1 - first_token)",
        "head = slice(lowest[depth] - first_token, max(highest[depth], lowest[depth] + 1) - first_token)",
        "off by one: a level's largest token is cut off",
        f"{VALUES.replace('cpp', 'linear')}",
    ),
    # Triton
    Defect(
        "kernels/_trie.py",
        "exists = child < end\n",
        "exists = child <= end\n",
        "off by one in the child range",
        TRITON,
    ),
    Defect(
        "kernels/_trie.py",
        'base = tl.where(highest == float("-inf"), 0.0, highest)',
        "base = highest",
        "a block of children at -inf spoils the sum",
        TRITON,
    ),
    Defect(
        "kernels/_trie.py",
        "total = total * tl.exp(lowered) + tl.sum(tl.exp(relative), 0)\n    # Children",
        "total = total + tl.sum(tl.exp(relative), 0)\n    # Children",
        "sums of earlier blocks keep an old peak",
        TRITON,
    ),
    Defect(
        "kernels/_trie.py",
        "return tl.where((low < end) & (found == wanted), low, -1)",
        "return tl.where(low < end, low, -1)",
        "a token off the trie takes the next larger sibling",
        TRITON,
    ),
    Defect(
        "kernels/trie_token_log_probs.py",
        "tl.where(padding | (wanted < 0), 0.0, log_prob)",
        "tl.where(wanted < 0, 0.0, log_prob)",
        "what follows the padding counts",
        TRITON,
    ),
    Defect(
        "kernels/trie_token_log_probs.py",
        "slope * (hit - tl.exp(values - peak - log_total))",
        "slope * (hit + tl.exp(values - peak - log_total))",
        "a swapped sign in the gradient",
        TRITON,
    ),
    Defect(
        "kernels/trie_log_softmax.py",
        "out = log_probs + index.to(tl.int64) * width\n",
        "out = log_probs + index.to(tl.int64) * steps\n",
        "a wrong stride of the result",
        TRITON,
    ),
    Defect(
        "kernels/trie_sample.py",
        "mass = tl.exp((values - peak) / divisor).to(tl.float64)",
        "mass = tl.exp(values - peak).to(tl.float64)",
        "the temperature is ignored",
        TRITON,
    ),
    Defect(
        "kernels/trajectory_balance.py",
        "counts = counts & tl.load(flags, mask=counts, other=False)",
        "flags += 0",
        "a dropped mask",
        TRITON,
    ),
    Defect(
        "kernels/trajectory_balance.py",
        "gap -= tl.load(log_rewards",
        "gap += tl.load(log_rewards",
        "a swapped sign in the residual",
        TRITON,
    ),
    Defect(
        "kernels/trie_trajectory_balance.py",
        "total += tl.where(padding, 0.0, log_prob)",
        "total += log_prob",
        "padding is not left out of the fused balance",
        TRITON,
    ),
    Defect(
        "gflowgr/ops/trie_linear_token_log_probs.py",
        "grad_logits = grad_logits * (1 - (logits / softcap).square())",
        "grad_logits = grad_logits * 1.0",
        "the cap's slope is left out of the gradient",
        "test_autograd.py -k linear",
    ),
    Defect(
        "gflowgr/ops/trie_linear_token_log_probs.py",
        "rows = torch.arange(base, base + size, device=weight.device).unsqueeze(0)",
        "rows = torch.arange(size, device=weight.device).unsqueeze(0)",
        "the sparse gradient lands on other rows",
        "test_ops.py -k linear",
    ),
    Defect(
        "gflowgr/ops/_registry.py",
        "torch._C._len_torch_dispatch_stack() > 0",
        "False",
        "a dispatch mode does not see the ops",
        "test_torch_library.py -k past",
    ),
    Defect(
        "csrc/flows.hpp",
        "reaching[kids.first + i] += reaching[node] * shares[i];",
        "reaching[kids.first + i] += shares[i];",
        "of many children each has its share of 1 instead of the parent's gradient",
        GRADIENTS,
    ),
    Defect(
        "csrc/exponentials.cpp",
        "if (reached + block > target) return i;",
        "if (block > target) return i;",
        "a block is held against the whole target",
        "test_ops.py -k cpp",
    ),
]
