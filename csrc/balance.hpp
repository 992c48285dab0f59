#pragma once

#include <cstdint>
#include <vector>

#include "policy.hpp"

// Trajectory balance: residual = log_z + sum of log P_F - log_rewards, loss = weights * residual^2, each (B,).
namespace gflowgr {

template <class S>
struct Balance {
  const S* log_rewards;
  const S* log_z;
  const S* weights;  // null: all 1
  S* loss;
  S* residual;

  void settle(std::int64_t b, double log_probability) const {
    residual[b] = static_cast<S>(log_z[b] + log_probability - log_rewards[b]);
    loss[b] = (weights == nullptr ? S{1} : weights[b]) * residual[b] * residual[b];
  }
};

// From log_probs (B, T); mask (B, T) says which count, null: all.
template <class S>
void trajectory_balance(const S* log_probs, const bool* mask, std::int64_t batch, std::int64_t steps,
                        const Balance<S>& balance) {
  for (std::int64_t b = 0; b < batch; ++b) {
    double total = 0;
    for (std::int64_t i = b * steps; i < (b + 1) * steps; ++i)
      if (mask == nullptr || mask[i]) total += log_probs[i];
    balance.settle(b, total);
  }
}

// grad_log_probs (B, T): the residual's gradient (B,) at every step that counts.
template <class S>
void trajectory_balance_backward(const S* grad_residual, const bool* mask, std::int64_t batch, std::int64_t steps,
                                 S* grad_log_probs) {
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t i = b * steps; i < (b + 1) * steps; ++i)
      grad_log_probs[i] = mask == nullptr || mask[i] ? grad_residual[b] : S{0};
}

// From logits (B, T, V) and tokens (B, T), scored from the nodes start (B,).
template <class T>
void trie_trajectory_balance(const Trie& trie, const Logits<T>& logits, const std::int64_t* tokens,
                             const std::int64_t* start, const Balance<Sum<T>>& balance, int threads) {
  std::vector<Sum<T>> log_probs(logits.rows());
  token_log_probs(trie, NoFilter{}, logits, tokens, start, log_probs.data(), threads);
  trajectory_balance<Sum<T>>(log_probs.data(), nullptr, logits.batch, logits.steps, balance);
}

}  // namespace gflowgr
