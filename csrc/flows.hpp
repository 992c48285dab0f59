#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "policy.hpp"

// Flows in closed form: F(s) is the sum of the rewards of the items at or under s.
namespace gflowgr {

// Items at or under a node are item_order[first_item[node]] .. for item_count[node]; those that end there first.
struct ItemTrie {
  Trie trie;
  const std::int32_t* first_item;
  const std::int32_t* item_count;
  const std::int32_t* item_order;
  std::int64_t items;

  // How many items end at each node.
  std::vector<std::int32_t> ending() const {
    std::vector<std::int32_t> counts(item_count, item_count + trie.nodes);
    for (std::int64_t node = 0; node < trie.nodes; ++node)
      for (std::int64_t child = trie.first_child[node]; child < trie.first_child[node + 1]; ++child)
        counts[node] -= item_count[child];
    return counts;
  }
};

// Vectors pay from this many parts of a sum on.
constexpr std::int64_t kFewParts = 8;

// The log of the summed exponentials; -inf where there is nothing to sum, NaN where there is one.
template <class S>
S log_sum(const S* parts, std::int64_t count, std::vector<S>& scratch) {
  if (count == 1) return parts[0];
  S peak = largest(parts, count);
  for (std::int64_t i = 0; i < count && std::isinf(peak); ++i)
    if (std::isnan(parts[i])) peak = parts[i];
  if (!std::isfinite(peak)) return peak;
  double total = 0;
  if (count < kFewParts) {
    for (std::int64_t i = 0; i < count; ++i) total += std::exp(parts[i] - peak);
  } else {
    scratch.resize(count);
    total = exp_differences(parts, count, peak, scratch.data());
  }
  return peak + std::log(static_cast<S>(total));
}

// Flows of one context: each node sums its own items and its children, deepest first.
template <class S>
class RowFlows {
 public:
  RowFlows(const ItemTrie& tree, const std::vector<std::int32_t>& ending_at) : tree_(tree), ending_at_(ending_at) {}

  void write(const S* rewards, S* flows) {
    if (!share_a_scale(rewards)) return write_by_logs(rewards, flows);
    const Trie& trie = tree_.trie;
    for (std::int64_t node = trie.nodes - 1; node >= 0; --node) {
      const Children kids = trie.children(node);
      const std::int64_t ending = ending_at_[node];
      const std::int32_t* own = tree_.item_order + tree_.first_item[node];
      if (ending + kids.count == 1) {
        flows[node] = ending == 1 ? rewards[own[0]] : flows[kids.first];
        mass_[node] = ending == 1 ? exponentials_[own[0]] : mass_[kids.first];
        continue;
      }
      double total = 0;
      for (std::int64_t child = kids.first; child < kids.first + kids.count; ++child) total += mass_[child];
      for (std::int64_t i = 0; i < ending; ++i) total += exponentials_[own[i]];
      mass_[node] = total;
      flows[node] = static_cast<S>(peak_ + std::log(total));
    }
  }

 private:
  // Whether all rewards can be numbers beside the largest one: then no sum needs a scale of its own.
  bool share_a_scale(const S* rewards) {
    exponentials_.resize(tree_.items);
    mass_.resize(tree_.trie.nodes);
    peak_ = largest(rewards, tree_.items);
    if (!std::isfinite(peak_)) return false;
    if (!std::isfinite(exp_differences(rewards, tree_.items, peak_, exponentials_.data()))) return false;
    bool vanishes = false;
    for (std::int64_t item = 0; item < tree_.items; ++item)
      vanishes |= (exponentials_[item] < std::numeric_limits<S>::min()) &
                  (rewards[item] != -std::numeric_limits<S>::infinity());
    return !vanishes;
  }

  void write_by_logs(const S* rewards, S* flows) {
    const Trie& trie = tree_.trie;
    for (std::int64_t node = trie.nodes - 1; node >= 0; --node) {
      const Children kids = trie.children(node);
      const std::int64_t ending = ending_at_[node];
      const std::int32_t* own = tree_.item_order + tree_.first_item[node];
      parts_.assign(flows + kids.first, flows + kids.first + kids.count);
      for (std::int64_t i = 0; i < ending; ++i) parts_.push_back(rewards[own[i]]);
      flows[node] = log_sum(parts_.data(), ending + kids.count, exponentials_);
    }
  }

  const ItemTrie& tree_;
  const std::vector<std::int32_t>& ending_at_;
  std::vector<S> exponentials_, parts_;
  std::vector<double> mass_;
  S peak_ = 0;
};

// log_flows (B, nodes) from log_rewards (B, N).
template <class S>
void log_flows(const ItemTrie& tree, const S* log_rewards, std::int64_t batch, S* log_flows, int threads) {
  const std::vector<std::int32_t> ending_at = tree.ending();
  parallel_for(batch, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    RowFlows<S> row(tree, ending_at);
    for (std::int64_t b = begin; b < end; ++b) row.write(log_rewards + b * tree.items, log_flows + b * tree.trie.nodes);
  });
}

// grad_rewards (B, N): what reaches a node is its own gradient and its share exp(F(s) - F(parent)) of the parent's.
template <class S>
void log_flows_backward(const ItemTrie& tree, const S* grad, const S* log_rewards, const S* log_flows,
                        std::int64_t batch, S* grad_rewards, int threads) {
  const Trie& trie = tree.trie;
  const std::vector<std::int32_t> ending_at = tree.ending();
  parallel_for(batch, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    std::vector<double> reaching(trie.nodes);
    std::vector<S> shares;
    for (std::int64_t b = begin; b < end; ++b) {
      const S* rewards = log_rewards + b * tree.items;
      const S* flows = log_flows + b * trie.nodes;
      std::copy(grad + b * trie.nodes, grad + (b + 1) * trie.nodes, reaching.begin());
      for (std::int64_t node = 0; node < trie.nodes; ++node) {
        const bool carries = flows[node] != -std::numeric_limits<S>::infinity();
        const Children kids = trie.children(node);
        const std::int64_t ending = ending_at[node];
        const std::int32_t* own = tree.item_order + tree.first_item[node];
        // What is the only part has all of it.
        const auto share = [&](S part) {
          if (!carries) return 0.0;
          return reaching[node] * (ending + kids.count == 1 ? 1.0 : std::exp(part - flows[node]));
        };
        if (kids.count < kFewParts) {
          for (std::int64_t i = 0; i < kids.count; ++i) reaching[kids.first + i] += share(flows[kids.first + i]);
        } else if (carries) {
          shares.resize(kids.count);
          exp_differences(flows + kids.first, kids.count, flows[node], shares.data());
          for (std::int64_t i = 0; i < kids.count; ++i) reaching[kids.first + i] += reaching[node] * shares[i];
        }
        for (std::int64_t i = 0; i < ending; ++i)
          grad_rewards[b * tree.items + own[i]] = static_cast<S>(share(rewards[own[i]]));
      }
    }
  });
}

// The flow-matching divergence of one row: KL(p* || P_F) over the children, p* the softmax of their flows.
template <class S>
struct ChildTarget {
  Policy<S> policy, target;
  bool has_choice = false;

  template <class T>
  S read(const T* row, std::int64_t stride, const S* flows, const Children& kids) {
    has_choice = false;
    if (kids.count < 2) return 0;
    for (std::int64_t child = 0; child < kids.count; ++child)
      has_choice |= flows[kids.first + child] != -std::numeric_limits<S>::infinity();
    if (!has_choice) return 0;
    indices_.resize(kids.count);
    for (std::int64_t child = 0; child < kids.count; ++child) indices_[child] = static_cast<std::int32_t>(child);
    policy.read(row, stride, kids);
    target.read(flows + kids.first, 1, {Tokens(indices_.data()), 0, kids.count});
    double divergence = 0;
    for (std::int64_t child = 0; child < kids.count; ++child) {
      const S log_target = target.log_prob(child);
      if (log_target == -std::numeric_limits<S>::infinity()) continue;
      divergence += target.probability(child) * (log_target - policy.log_prob(child));
    }
    return static_cast<S>(divergence);
  }

 private:
  std::vector<std::int32_t> indices_;
};

// divergence (rows,); `rows_per_flow` consecutive rows share a row of log_flows (rows / rows_per_flow, nodes).
template <class T>
void flow_matching(const Trie& trie, const Logits<T>& logits, const std::int64_t* nodes, const Sum<T>* log_flows,
                   std::int64_t rows_per_flow, Sum<T>* divergence, int threads) {
  const std::int64_t grain = grain_of(logits.rows(), [&](std::int64_t r) { return 2 * row_cost(trie, nodes[r]); });
  parallel_for(logits.rows(), grain, threads, [&](std::int64_t begin, std::int64_t end) {
    ChildTarget<Sum<T>> row;
    for (std::int64_t r = begin; r < end; ++r)
      divergence[r] = row.read(logits.row(r), logits.token_stride, log_flows + r / rows_per_flow * trie.nodes,
                               trie.children(nodes[r]));
  });
}

// grad_logits (B, T, V) and, unless null, grad_flows (like log_flows), both zeroed.
template <class T>
void flow_matching_backward(const Trie& trie, const Logits<T>& logits, const std::int64_t* nodes,
                            const Sum<T>* log_flows, std::int64_t rows_per_flow, const Sum<T>* grad, T* grad_logits,
                            Sum<T>* grad_flows, int threads) {
  const std::int64_t groups = rows_per_flow > 0 ? logits.rows() / rows_per_flow : 0;
  // Rows that share flows stay on one thread, so their sums have one order.
  const std::int64_t grain = grain_of(
      groups, [&](std::int64_t group) { return 3 * rows_per_flow * row_cost(trie, nodes[group * rows_per_flow]); });
  parallel_for(groups, grain, threads, [&](std::int64_t begin, std::int64_t end) {
    ChildTarget<Sum<T>> row;
    for (std::int64_t r = begin * rows_per_flow; r < end * rows_per_flow; ++r) {
      const std::int64_t offset = r / rows_per_flow * trie.nodes;
      const Children kids = trie.children(nodes[r]);
      const double divergence = row.read(logits.row(r), logits.token_stride, log_flows + offset, kids);
      if (!row.has_choice) continue;
      for (std::int64_t child = 0; child < kids.count; ++child) {
        const Sum<T> log_policy = row.policy.log_prob(child), log_target = row.target.log_prob(child);
        const double probability = row.policy.probability(child), target = row.target.probability(child);
        grad_logits[r * logits.width + kids.tokens[child]] = narrow<T>(grad[r] * (probability - target));
        if (grad_flows != nullptr && target > 0)
          grad_flows[offset + kids.first + child] +=
              static_cast<Sum<T>>(grad[r] * target * (log_target - log_policy - divergence));
      }
    }
  });
}

}  // namespace gflowgr
