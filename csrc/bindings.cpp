#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <tuple>

#include "balance.hpp"
#include "build.hpp"
#include "filter_build.hpp"
#include "flows.hpp"
#include "policy.hpp"

// Arrays come as addresses with their shapes, so that the core needs no tensor library; the callers in Python
// check dtypes, sizes and contiguity.
namespace py = pybind11;

namespace gflowgr {
namespace {

using Address = std::uintptr_t;
// first_child, token, number of nodes
using TrieArgs = std::tuple<Address, Address, std::int64_t>;
// first_item, item_count, item_order, number of items
using ItemArgs = std::tuple<Address, Address, Address, std::int64_t>;
// data, dtype, shape (B, T, V), strides, first token
using LogitsArgs = std::tuple<Address, int, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                              std::int64_t, std::int64_t>;

// hidden_offsets (0 for no filter), hidden_nodes, allowed, allowed_set (0 for none), rows, words of a set
using FilterArgs = std::tuple<Address, Address, Address, Address, std::int64_t, std::int64_t>;
// first_item, item_count, item_order, item_node, number of items
using EndingArgs = std::tuple<Address, Address, Address, Address, std::int64_t>;
// log_rewards, log_z, weights, loss, residual
using BalanceArgs = std::tuple<Address, Address, Address, Address, Address>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Trie trie_of(const TrieArgs& args) {
  const auto& [first_child, token, nodes] = args;
  return {at<const std::int32_t>(first_child), at<const std::int32_t>(token), nodes};
}

ItemTrie item_trie_of(const TrieArgs& trie, const ItemArgs& args) {
  const auto& [first_item, item_count, item_order, items] = args;
  return {trie_of(trie), at<const std::int32_t>(first_item), at<const std::int32_t>(item_count),
          at<const std::int32_t>(item_order), items};
}

template <class T>
Logits<T> logits_of(const LogitsArgs& args) {
  const auto& [data, dtype, batch, steps, width, batch_stride, step_stride, token_stride, first_token] = args;
  return {at<const T>(data), batch, steps, width, batch_stride, step_stride, token_stride, first_token};
}

EndingItems ending_items_of(const TrieArgs& trie, const EndingArgs& args) {
  const auto& [first_item, item_count, item_order, item_node, items] = args;
  return {trie_of(trie),
          at<const std::int32_t>(first_item),
          at<const std::int32_t>(item_count),
          at<const std::int32_t>(item_order),
          at<const std::int32_t>(item_node),
          items};
}

// Runs body(filter) with what filters, or with a filter of another type that keeps everything.
template <class Body>
void with_filter(const FilterArgs& args, const Body& body) {
  const auto& [hidden_offsets, hidden_nodes, allowed, allowed_set, rows, words] = args;
  if (!hidden_offsets) return body(NoFilter{});
  body(ItemFilter{at<const std::int64_t>(hidden_offsets), at<const std::int32_t>(hidden_nodes),
                  at<const std::int32_t>(allowed), at<const std::int64_t>(allowed_set), rows, words});
}

template <class S>
Balance<S> balance_of(const BalanceArgs& args) {
  const auto& [log_rewards, log_z, weights, loss, residual] = args;
  return {at<const S>(log_rewards), at<const S>(log_z), at<const S>(weights), at<S>(loss), at<S>(residual)};
}

// Runs body(T*) for the logits' dtype without the interpreter's lock.
template <class Body>
void for_dtype_of(const LogitsArgs& logits, const Body& body) {
  py::gil_scoped_release release;
  dispatch(static_cast<Dtype>(std::get<1>(logits)), body);
}

template <class T>
py::array_t<T> adopt(std::vector<T>&& values) {
  auto owner = std::make_unique<std::vector<T>>(std::move(values));
  const auto* data = owner->data();
  const auto size = static_cast<py::ssize_t>(owner->size());
  py::capsule keeper(owner.release(), [](void* held) { delete static_cast<std::vector<T>*>(held); });
  return py::array_t<T>(size, data, keeper);
}

template <class Token>
py::dict build(const py::array_t<Token, py::array::c_style>& rows) {
  if (rows.ndim() != 2) throw std::invalid_argument("sequences needs two dimensions");
  const Token* data = rows.data();
  const std::int64_t items = rows.shape(0), levels = rows.shape(1);
  TrieArrays arrays;
  {
    py::gil_scoped_release release;
    arrays = build_trie(data, items, levels);
  }
  py::dict result;
  result["first_child"] = adopt(std::move(arrays.first_child));
  result["token"] = adopt(std::move(arrays.token));
  result["first_item"] = adopt(std::move(arrays.first_item));
  result["item_count"] = adopt(std::move(arrays.item_count));
  result["item_order"] = adopt(std::move(arrays.item_order));
  result["item_node"] = adopt(std::move(arrays.item_node));
  return result;
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The C++ core: builds tries and runs the ops on the CPU.";

  module.def("build_trie", &build<std::int32_t>, py::arg("rows").noconvert());
  module.def("build_trie", &build<std::int64_t>, py::arg("rows").noconvert());

  module.def("walk", [](const TrieArgs& trie, Address tokens, Address start, std::int64_t batch, std::int64_t steps,
                        Address nodes, int threads) {
    py::gil_scoped_release release;
    walk(trie_of(trie), at<const std::int64_t>(tokens), at<const std::int64_t>(start), batch, steps,
         at<std::int64_t>(nodes), threads);
  });

  module.def("log_softmax", [](const TrieArgs& trie, const FilterArgs& filter, const LogitsArgs& logits, Address nodes,
                               Address out, int threads) {
    for_dtype_of(logits, [&]<class T>(T*) {
      with_filter(filter, [&](const auto& view) {
        log_softmax(trie_of(trie), view, logits_of<T>(logits), at<const std::int64_t>(nodes), at<Sum<T>>(out), threads);
      });
    });
  });

  // `places` is how many children of a node the result has room for.
  module.def("child_log_probs", [](const TrieArgs& trie, const FilterArgs& filter, const LogitsArgs& logits,
                                   Address nodes, std::int64_t places, Address out, int threads) {
    for_dtype_of(logits, [&]<class T>(T*) {
      with_filter(filter, [&](const auto& view) {
        child_log_probs(trie_of(trie), view, logits_of<T>(logits), at<const std::int64_t>(nodes), places,
                        at<Sum<T>>(out), threads);
      });
    });
  });

  module.def("child_log_probs_backward",
             [](const TrieArgs& trie, const FilterArgs& filter, const LogitsArgs& logits, Address nodes,
                std::int64_t places, Address grad, Address grad_logits, int threads) {
               for_dtype_of(logits, [&]<class T>(T*) {
                 with_filter(filter, [&](const auto& view) {
                   child_log_probs_backward(trie_of(trie), view, logits_of<T>(logits), at<const std::int64_t>(nodes),
                                            places, at<const Sum<T>>(grad), at<T>(grad_logits), threads);
                 });
               });
             });

  // Sets bits of items and of nodes that are all 0 before.
  module.def("allow", [](const TrieArgs& trie, const EndingArgs& ending, Address members, std::int64_t count,
                         Address item_bits, Address node_bits) {
    py::gil_scoped_release release;
    allow(ending_items_of(trie, ending), at<const std::int64_t>(members), count,
          {at<std::int32_t>(item_bits), at<std::int32_t>(node_bits)});
  });

  // `sets` are the addresses of each row's bits of items and of nodes, empty where rows may get everything.
  module.def("hidden_nodes", [](const TrieArgs& trie, const EndingArgs& ending, Address offsets, Address excluded,
                                std::int64_t rows, const std::vector<std::pair<Address, Address>>& sets, int threads) {
    HiddenNodes found;
    {
      py::gil_scoped_release release;
      std::vector<AllowedSet> allowed;
      for (const auto& [items, nodes] : sets) allowed.push_back({at<std::int32_t>(items), at<std::int32_t>(nodes)});
      found = hidden_nodes(ending_items_of(trie, ending), at<const std::int64_t>(offsets),
                           at<const std::int64_t>(excluded), rows, sets.empty() ? nullptr : &allowed, threads);
    }
    return py::make_tuple(adopt(std::move(found.offsets)), adopt(std::move(found.nodes)));
  });

  // `dtype` is the logits'; `grad` and `log_probs` have its accumulation type.
  module.def("log_softmax_backward", [](const TrieArgs& trie, const FilterArgs& filter, const LogitsArgs& grad,
                                        int dtype, Address log_probs, Address nodes, Address grad_logits, int threads) {
    py::gil_scoped_release release;
    dispatch(static_cast<Dtype>(dtype), [&]<class T>(T*) {
      with_filter(filter, [&](const auto& view) {
        log_softmax_backward<T>(trie_of(trie), view, logits_of<Sum<T>>(grad), at<const Sum<T>>(log_probs),
                                at<const std::int64_t>(nodes), at<T>(grad_logits), threads);
      });
    });
  });

  module.def("token_log_probs", [](const TrieArgs& trie, const FilterArgs& filter, const LogitsArgs& logits,
                                   Address tokens, Address start, Address out, int threads) {
    for_dtype_of(logits, [&]<class T>(T*) {
      with_filter(filter, [&](const auto& view) {
        token_log_probs(trie_of(trie), view, logits_of<T>(logits), at<const std::int64_t>(tokens),
                        at<const std::int64_t>(start), at<Sum<T>>(out), threads);
      });
    });
  });

  module.def("token_log_probs_backward", [](const TrieArgs& trie, const FilterArgs& filter, const LogitsArgs& logits,
                                            Address tokens, Address start, Address grad, Address grad_logits,
                                            int threads) {
    for_dtype_of(logits, [&]<class T>(T*) {
      with_filter(filter, [&](const auto& view) {
        token_log_probs_backward(trie_of(trie), view, logits_of<T>(logits), at<const std::int64_t>(tokens),
                                 at<const std::int64_t>(start), at<const Sum<T>>(grad), at<T>(grad_logits), threads);
      });
    });
  });

  module.def("sample", [](const TrieArgs& trie, const FilterArgs& filter, const LogitsArgs& logits, Address nodes,
                          Address uniform, double temperature, Address out_tokens, Address out_nodes,
                          Address out_log_probs, int threads) {
    for_dtype_of(logits, [&]<class T>(T*) {
      with_filter(filter, [&](const auto& view) {
        sample(trie_of(trie), view, logits_of<T>(logits), at<const std::int64_t>(nodes), at<const double>(uniform),
               temperature, at<std::int64_t>(out_tokens), at<std::int64_t>(out_nodes), at<Sum<T>>(out_log_probs),
               threads);
      });
    });
  });

  // `weights` and `mask` may be 0: all weights 1, all steps count.
  module.def("trajectory_balance", [](int dtype, Address log_probs, Address mask, std::int64_t batch,
                                      std::int64_t steps, const BalanceArgs& balance) {
    py::gil_scoped_release release;
    dispatch(static_cast<Dtype>(dtype), [&]<class T>(T*) {
      trajectory_balance(at<const Sum<T>>(log_probs), at<const bool>(mask), batch, steps, balance_of<Sum<T>>(balance));
    });
  });

  module.def("trajectory_balance_backward", [](int dtype, Address grad_residual, Address mask, std::int64_t batch,
                                               std::int64_t steps, Address grad_log_probs) {
    py::gil_scoped_release release;
    dispatch(static_cast<Dtype>(dtype), [&]<class T>(T*) {
      trajectory_balance_backward(at<const Sum<T>>(grad_residual), at<const bool>(mask), batch, steps,
                                  at<Sum<T>>(grad_log_probs));
    });
  });

  module.def("trie_trajectory_balance", [](const TrieArgs& trie, const LogitsArgs& logits, Address tokens,
                                           Address start, const BalanceArgs& balance, int threads) {
    for_dtype_of(logits, [&]<class T>(T*) {
      trie_trajectory_balance(trie_of(trie), logits_of<T>(logits), at<const std::int64_t>(tokens),
                              at<const std::int64_t>(start), balance_of<Sum<T>>(balance), threads);
    });
  });

  module.def("log_flows", [](const TrieArgs& trie, const ItemArgs& items, int dtype, Address log_rewards,
                             std::int64_t batch, Address out, int threads) {
    py::gil_scoped_release release;
    dispatch(static_cast<Dtype>(dtype), [&]<class T>(T*) {
      log_flows(item_trie_of(trie, items), at<const Sum<T>>(log_rewards), batch, at<Sum<T>>(out), threads);
    });
  });

  module.def("log_flows_backward",
             [](const TrieArgs& trie, const ItemArgs& items, int dtype, Address grad, Address log_rewards,
                Address flows, std::int64_t batch, Address grad_rewards, int threads) {
               py::gil_scoped_release release;
               dispatch(static_cast<Dtype>(dtype), [&]<class T>(T*) {
                 log_flows_backward(item_trie_of(trie, items), at<const Sum<T>>(grad), at<const Sum<T>>(log_rewards),
                                    at<const Sum<T>>(flows), batch, at<Sum<T>>(grad_rewards), threads);
               });
             });

  module.def("flow_matching", [](const TrieArgs& trie, const LogitsArgs& logits, Address nodes, Address flows,
                                 std::int64_t rows_per_flow, Address divergence, int threads) {
    for_dtype_of(logits, [&]<class T>(T*) {
      flow_matching(trie_of(trie), logits_of<T>(logits), at<const std::int64_t>(nodes), at<const Sum<T>>(flows),
                    rows_per_flow, at<Sum<T>>(divergence), threads);
    });
  });

  // `grad_flows` may be 0: then that gradient is not made.
  module.def("flow_matching_backward",
             [](const TrieArgs& trie, const LogitsArgs& logits, Address nodes, Address flows,
                std::int64_t rows_per_flow, Address grad, Address grad_logits, Address grad_flows, int threads) {
               for_dtype_of(logits, [&]<class T>(T*) {
                 flow_matching_backward(trie_of(trie), logits_of<T>(logits), at<const std::int64_t>(nodes),
                                        at<const Sum<T>>(flows), rows_per_flow, at<const Sum<T>>(grad),
                                        at<T>(grad_logits), at<Sum<T>>(grad_flows), threads);
               });
             });
}

}  // namespace gflowgr
