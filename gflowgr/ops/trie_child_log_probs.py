"""The forward policy over the children of nodes, one column a child."""

from __future__ import annotations

from torch import Tensor

from gflowgr import reference
from gflowgr.ops import _checks
from gflowgr.ops._registry import resolve_backend


def trie_child_log_probs(
    logits: Tensor,
    nodes: Tensor,
    trie: _checks.CatalogueTrie,
    *,
    item_filter: _checks.CatalogueFilter | None = None,
    first_token: int = 0,
    width: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """log P_F of the i-th child of each row's node, child i being the node `trie.first_child[node] + i`.

    What `trie_log_softmax` gives, without a column for the tokens that no child has.

    Args:
        logits: (..., V) float32, float64, bfloat16 or float16, any strides. Column c belongs to the token
            `first_token + c`; a child whose token has no column is not available.
        nodes: (...) integers; a row at a leaf or at -1 comes out as -inf.
        trie: on the device of `logits`.
        item_filter: row b filters all of `logits[b]`; the policy is over the available children.
        first_token: the token of the first column, as a head that is sliced to one depth's
            `trie.token_ranges` has it.
        width: columns of the result, `trie.max_children` by default. Children beyond it are left out of the
            result, not of the policy.
        backend: "auto", "cpp", "triton" or "torch".

    Returns:
        (..., width) float32 (float64 for float64 logits), differentiable in `logits`; -inf beyond the last
        child and for children that are not available. An only available child has log-prob exactly 0 and no
        gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device, range or columns.
        RuntimeError: `backend` cannot serve here.
    """
    logits = _checks.floats("logits", logits, 1)
    nodes = _checks.integers("nodes", nodes, logits.shape[:-1])
    _checks.same_device("nodes", nodes, logits.device)
    _checks.trie_for(trie, logits.device)
    _checks.columns_for(trie, first_token, logits.shape[-1])
    _checks.filter_for(item_filter, trie, logits, 2)
    width = trie.max_children if width is None else _checks.at_least("width", width, 1)
    resolve_backend(backend, "trie_child_log_probs", logits.device)
    return reference.trie_child_log_probs(logits, nodes, trie, first_token, width, item_filter)
