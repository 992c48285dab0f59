#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "exponentials.hpp"
#include "filter.hpp"
#include "parallel.hpp"
#include "scalar.hpp"
#include "trie.hpp"

// The forward policy P_F: the softmax of the logits over the children of a node. Everything here touches the
// available children only. Shapes: B batch, T steps, V width; arrays without strides are contiguous. A filter is a
// `NoFilter` or an `ItemFilter`.
namespace gflowgr {

// About nanoseconds: of a row, and of a step to a child.
constexpr std::int64_t kRowCost = 40, kStepCost = 10;

// What a softmax over the children of a node costs, in about nanoseconds.
inline std::int64_t row_cost(const Trie& trie, std::int64_t node) { return kRowCost + trie.children(node).count; }

inline std::int64_t path_cost(const Trie& trie, std::int64_t node, const std::int64_t* tokens, std::int64_t steps) {
  std::int64_t total = 0;
  for (std::int64_t t = 0; t < steps && node >= 0; ++t) {
    total += row_cost(trie, node);
    node = trie.step(node, tokens[t]);
  }
  return total;
}

// Logits (B, T, V) with any strides; column c belongs to token first_token + c.
template <class T>
struct Logits {
  const T* data;
  std::int64_t batch, steps, width;
  std::int64_t batch_stride, step_stride, token_stride;
  std::int64_t first_token;

  std::int64_t rows() const { return batch * steps; }
  const T* row(std::int64_t index) const {
    return data + index / steps * batch_stride + index % steps * step_stride - first_token * token_stride;
  }
};

template <class T>
using Sum = decltype(widen(T{}));

// The children's logits of one row, and what a softmax needs of them.
template <class S>
class Policy {
 public:
  template <class T, class Kids = Children>
  void read(const T* row, std::int64_t stride, const Kids& kids) {
    values_.resize(kids.count);
    exponentials_.resize(kids.count);
    const std::int64_t lowest = kids.tokens[0];
    if (stride == 1 && kids.tokens[kids.count - 1] - lowest == kids.count - 1) {
      for (std::int64_t child = 0; child < kids.count; ++child) values_[child] = widen(row[lowest + child]);
    } else {
      for (std::int64_t child = 0; child < kids.count; ++child)
        values_[child] = widen(row[kids.tokens[child] * stride]);
    }
    peak_ = largest(values_.data(), kids.count);
    total_ = exp_differences(values_.data(), kids.count, peak_, exponentials_.data());
    log_total_ = std::log(total_);
    one_over_total_ = 1 / total_;
  }
  S log_prob(std::int64_t child) const { return (values_[child] - peak_) - static_cast<S>(log_total_); }
  double probability(std::int64_t child) const { return exponentials_[child] * one_over_total_; }

  // The probabilities times a factor, in place of the exponentials: the last thing to ask for.
  const S* scaled_probabilities(double factor) {
    const S scale = static_cast<S>(factor * one_over_total_);
    for (S& value : exponentials_) value *= scale;
    return exponentials_.data();
  }

  // The child at which the distribution function of softmax(logits / temperature) passes `uniform`. Another
  // temperature than 1 takes the place of the exponentials.
  std::int64_t draw(double uniform, double temperature) {
    const auto count = static_cast<std::int64_t>(exponentials_.size());
    double total = total_;
    // Logits with a NaN are no distribution: the first child, whatever the order of the others.
    if (!(total > 0)) return 0;
    if (temperature != 1) {
      for (std::int64_t child = 0; child < count; ++child)
        exponentials_[child] = static_cast<S>((values_[child] - peak_) / temperature);
      total = exp_differences(exponentials_.data(), count, S{0}, exponentials_.data());
    }
    return first_above(exponentials_.data(), count, uniform * total);
  }

 private:
  std::vector<S> values_, exponentials_;
  S peak_ = 0;
  double total_ = 0, log_total_ = 0, one_over_total_ = 0;
};

// The node after each token of (B, T), from start (B,); -1 from the first miss on.
inline void walk(const Trie& trie, const std::int64_t* tokens, const std::int64_t* start, std::int64_t batch,
                 std::int64_t steps, std::int64_t* nodes, int threads) {
  const std::int64_t grain = grain_of(batch, [&](std::int64_t) { return steps * kStepCost; });
  parallel_for(batch, grain, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) {
      std::int64_t node = start[b];
      for (std::int64_t t = 0; t < steps; ++t) nodes[b * steps + t] = node = trie.step(node, tokens[b * steps + t]);
    }
  });
}

// out (B, T, V): log-probs over the children of nodes (B, T), -inf elsewhere.
template <class T, class Filter>
void log_softmax(const Trie& trie, const Filter& filter, const Logits<T>& logits, const std::int64_t* nodes,
                 Sum<T>* out, int threads) {
  const std::int64_t grain =
      grain_of(logits.rows(), [&](std::int64_t r) { return row_cost(trie, nodes[r]) + logits.width / 8; });
  parallel_for(logits.rows(), grain, threads, [&](std::int64_t begin, std::int64_t end) {
    Policy<Sum<T>> policy;
    auto reader = filter.reader(trie, logits.rows());
    for (std::int64_t r = begin; r < end; ++r) {
      Sum<T>* row = out + r * logits.width;
      std::fill(row, row + logits.width, -std::numeric_limits<Sum<T>>::infinity());
      reader.children(r, nodes[r], [&](const auto& kids) {
        if (kids.count == 1) row[kids.tokens[0]] = 0;
        if (kids.count < 2) return;
        policy.read(logits.row(r), logits.token_stride, kids);
        for (std::int64_t child = 0; child < kids.count; ++child) row[kids.tokens[child]] = policy.log_prob(child);
      });
    }
  });
}

// grad_logits (B, T, V), zeroed: grad - P_F * sum of grad over the children, from log_probs = log_softmax's out.
template <class T, class Filter>
void log_softmax_backward(const Trie& trie, const Filter& filter, const Logits<Sum<T>>& grad, const Sum<T>* log_probs,
                          const std::int64_t* nodes, T* grad_logits, int threads) {
  const std::int64_t grain = grain_of(grad.rows(), [&](std::int64_t r) { return row_cost(trie, nodes[r]); });
  parallel_for(grad.rows(), grain, threads, [&](std::int64_t begin, std::int64_t end) {
    auto reader = filter.reader(trie, grad.rows());
    for (std::int64_t r = begin; r < end; ++r) {
      reader.children(r, nodes[r], [&](const auto& kids) {
        if (kids.count < 2) return;
        const Sum<T>* row = grad.row(r);
        double total = 0;
        for (std::int64_t child = 0; child < kids.count; ++child) total += row[kids.tokens[child] * grad.token_stride];
        for (std::int64_t child = 0; child < kids.count; ++child) {
          const std::int64_t token = kids.tokens[child];
          const double probability = std::exp(log_probs[r * grad.width + token]);
          grad_logits[r * grad.width + token] = narrow<T>(row[token * grad.token_stride] - probability * total);
        }
      });
    }
  });
}

// out (B, T, C): log P_F of the i-th child of nodes (B, T), -inf beyond the last and where it is not available, as
// it is without a column. Children from C on are left out.
template <class T, class Filter>
void child_log_probs(const Trie& trie, const Filter& filter, const Logits<T>& logits, const std::int64_t* nodes,
                     std::int64_t places, Sum<T>* out, int threads) {
  const Columns columns{logits.first_token, logits.width};
  const std::int64_t grain =
      grain_of(logits.rows(), [&](std::int64_t r) { return row_cost(trie, nodes[r]) + places / 8; });
  parallel_for(logits.rows(), grain, threads, [&](std::int64_t begin, std::int64_t end) {
    Policy<Sum<T>> policy;
    auto reader = filter.reader(trie, logits.rows());
    for (std::int64_t r = begin; r < end; ++r) {
      Sum<T>* row = out + r * places;
      std::fill(row, row + places, -std::numeric_limits<Sum<T>>::infinity());
      reader.children(r, nodes[r], columns, [&](const auto& kids) {
        if (kids.count > 1) policy.read(logits.row(r), logits.token_stride, kids);
        for (std::int64_t child = 0; child < kids.count; ++child) {
          const std::int64_t place = node_of(kids, child) - kids.first;
          if (place >= places) break;
          row[place] = kids.count > 1 ? policy.log_prob(child) : 0;
        }
      });
    }
  });
}

// grad_logits (B, T, V), zeroed: grad (B, T, C) - P_F * sum of grad over the children.
template <class T, class Filter>
void child_log_probs_backward(const Trie& trie, const Filter& filter, const Logits<T>& logits,
                              const std::int64_t* nodes, std::int64_t places, const Sum<T>* grad, T* grad_logits,
                              int threads) {
  const Columns columns{logits.first_token, logits.width};
  const std::int64_t grain = grain_of(logits.rows(), [&](std::int64_t r) { return row_cost(trie, nodes[r]); });
  parallel_for(logits.rows(), grain, threads, [&](std::int64_t begin, std::int64_t end) {
    Policy<Sum<T>> policy;
    auto reader = filter.reader(trie, logits.rows());
    for (std::int64_t r = begin; r < end; ++r) {
      reader.children(r, nodes[r], columns, [&](const auto& kids) {
        if (kids.count < 2) return;
        policy.read(logits.row(r), logits.token_stride, kids);
        const auto slope = [&](std::int64_t child) {
          const std::int64_t place = node_of(kids, child) - kids.first;
          return place < places ? grad[r * places + place] : Sum<T>{0};
        };
        double total = 0;
        for (std::int64_t child = 0; child < kids.count; ++child) total += slope(child);
        T* slopes = grad_logits + r * logits.width - logits.first_token;
        for (std::int64_t child = 0; child < kids.count; ++child)
          slopes[kids.tokens[child]] = narrow<T>(slope(child) - policy.probability(child) * total);
      });
    }
  });
}

// Calls visit(step, node, next) for the steps of one path that are on the trie, where next = -1 off it;
// returns the number of steps before the padding.
template <class Visit>
std::int64_t follow(const Trie& trie, std::int64_t node, const std::int64_t* tokens, std::int64_t steps,
                    const Visit& visit) {
  std::int64_t t = 0;
  for (; t < steps && tokens[t] >= 0; ++t) {
    const std::int64_t next = trie.step(node, tokens[t]);
    visit(t, node, next);
    node = next;
  }
  return t;
}

// out (B, T): log P_F of tokens (B, T) from the nodes start (B,); 0 from a -1 on, -inf from a miss on.
template <class T, class Filter>
void token_log_probs(const Trie& trie, const Filter& filter, const Logits<T>& logits, const std::int64_t* tokens,
                     const std::int64_t* start, Sum<T>* out, int threads) {
  const std::int64_t steps = logits.steps;
  const std::int64_t grain =
      grain_of(logits.batch, [&](std::int64_t b) { return path_cost(trie, start[b], tokens + b * steps, steps); });
  parallel_for(logits.batch, grain, threads, [&](std::int64_t begin, std::int64_t end) {
    Policy<Sum<T>> policy;
    auto reader = filter.reader(trie, logits.batch);
    for (std::int64_t b = begin; b < end; ++b) {
      Sum<T>* row = out + b * steps;
      const std::int64_t length =
          follow(trie, start[b], tokens + b * steps, steps, [&](std::int64_t t, std::int64_t node, std::int64_t next) {
            row[t] = -std::numeric_limits<Sum<T>>::infinity();
            if (next < 0) return;
            reader.children(b, node, [&](const auto& kids) {
              const std::int64_t hit = find_node(kids, next);
              if (hit < 0) return;
              row[t] = 0;
              if (kids.count < 2) return;
              policy.read(logits.row(b * steps + t), logits.token_stride, kids);
              row[t] = policy.log_prob(hit);
            });
          });
      std::fill(row + length, row + steps, Sum<T>{0});
    }
  });
}

// grad_logits (B, T, V), zeroed: grad (B, T) times (1[token] - P_F) over the children.
template <class T, class Filter>
void token_log_probs_backward(const Trie& trie, const Filter& filter, const Logits<T>& logits,
                              const std::int64_t* tokens, const std::int64_t* start, const Sum<T>* grad, T* grad_logits,
                              int threads) {
  const std::int64_t steps = logits.steps;
  const std::int64_t grain =
      grain_of(logits.batch, [&](std::int64_t b) { return path_cost(trie, start[b], tokens + b * steps, steps); });
  parallel_for(logits.batch, grain, threads, [&](std::int64_t begin, std::int64_t end) {
    Policy<Sum<T>> policy;
    auto reader = filter.reader(trie, logits.batch);
    for (std::int64_t b = begin; b < end; ++b) {
      follow(trie, start[b], tokens + b * steps, steps, [&](std::int64_t t, std::int64_t node, std::int64_t next) {
        if (next < 0) return;
        reader.children(b, node, [&](const auto& kids) {
          const std::int64_t hit = find_node(kids, next);
          if (hit < 0 || kids.count < 2) return;
          const std::int64_t r = b * steps + t;
          policy.read(logits.row(r), logits.token_stride, kids);
          T* row = grad_logits + r * logits.width - logits.first_token;
          const double left = 1.0 - policy.probability(hit);
          const Sum<T>* shares = policy.scaled_probabilities(-grad[r]);
          for (std::int64_t child = 0; child < kids.count; ++child) row[kids.tokens[child]] = narrow<T>(shares[child]);
          row[kids.tokens[hit]] = narrow<T>(grad[r] * left);
        });
      });
    }
  });
}

// Draws a child of each node by inverting the CDF of softmax(logits / temperature) at uniform in [0, 1);
// log-probs are those of temperature 1. (-1, -1, 0) where a node has no children.
template <class T, class Filter>
void sample(const Trie& trie, const Filter& filter, const Logits<T>& logits, const std::int64_t* nodes,
            const double* uniform, double temperature, std::int64_t* out_tokens, std::int64_t* out_nodes,
            Sum<T>* out_log_probs, int threads) {
  using S = Sum<T>;
  const std::int64_t grain = grain_of(logits.rows(), [&](std::int64_t r) { return row_cost(trie, nodes[r]); });
  parallel_for(logits.rows(), grain, threads, [&](std::int64_t begin, std::int64_t end) {
    Policy<S> policy;
    auto reader = filter.reader(trie, logits.rows());
    for (std::int64_t r = begin; r < end; ++r) {
      reader.children(r, nodes[r], [&](const auto& kids) {
        if (kids.count == 0) {
          out_tokens[r] = out_nodes[r] = -1;
          out_log_probs[r] = 0;
          return;
        }
        std::int64_t drawn = 0;
        S log_prob = 0;
        if (kids.count > 1) {
          policy.read(logits.row(r), logits.token_stride, kids);
          drawn = policy.draw(uniform[r], temperature);
          log_prob = policy.log_prob(drawn);
        }
        out_tokens[r] = kids.tokens[drawn];
        out_nodes[r] = node_of(kids, drawn);
        out_log_probs[r] = log_prob;
      });
    }
  });
}

}  // namespace gflowgr
