// The operators' schemas. Devices add their implementations with STABLE_TORCH_LIBRARY_IMPL.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(xformers_sparsek, m) {
  // scores [B, Mk, G] -> threshold [B, G, Mq], expiry [B, G, Mk] (see common/pattern.h).
  m.def(
      "select(Tensor scores, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt num_queries, int num_keys, int window, "
      "bool causal, bool hard) -> (Tensor threshold, Tensor expiry)");
  // query [B, Mq, H, K], key [B, Mk, G, K], value [B, Mk, G, Kv] -> out [B, Mq, H, Kv], lse [B, H, Mq].
  // `forward_kernel` and `backward_kernel` name one of a device's kernels ("sm90", "sm80" or "simt" on CUDA); None
  // takes the best one. Forward passes the latter on to its derivative. (Not `kernel`: that is what PyTorch's Inductor
  // calls an argument of its own.)
  m.def(
      "forward(Tensor query, Tensor key, Tensor value, Tensor scores, Tensor threshold, Tensor expiry, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int window, bool causal, bool hard, float scale, "
      "ScalarType? out_dtype, str? forward_kernel=None, str? backward_kernel=None) -> (Tensor out, Tensor lse)");
  // Gradients in the shapes and dtypes of query, key, value and scores.
  m.def(
      "backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor scores, Tensor out, "
      "Tensor lse, Tensor threshold, Tensor expiry, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int window, "
      "bool causal, bool hard, float scale, str? backward_kernel=None) "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_scores)");
  // Appends one token for each batch entry to a cache (common/cache.h), and finds what its query sees: threshold
  // [B, G, 1] and expiry [B, G, slots + window] for `forward` over the cache, not causal.
  m.def(
      "append(Tensor key, Tensor value, Tensor scores, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor(c!) score, "
      "Tensor(d!) waiting, Tensor(e!) position, Tensor(f!) next, Tensor(g!) length, Tensor(h!) overflow, int num_keys, "
      "int window, bool hard) -> (Tensor threshold, Tensor expiry)");
}
