// What the kernels of the operator `select` read and write. Passed to kernels by value.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "common/pattern.h"
#include "common/rows.h"
#include "cuda/common/sequences.h"

namespace sparsek::cuda {

// Candidates compete by their level: the score itself for soft gates; for hard ones the score's bits followed by the
// complement of the key's index, so that no two keys tie.
template <typename T, bool kHard>
using Level = std::conditional_t<!kHard, T, std::conditional_t<sizeof(T) == 4, uint64_t, unsigned __int128>>;

// A sequence is walked chunk by chunk; what survives up to the start of a chunk is kept for the tiles inside it.
template <typename T, bool kHard>
constexpr int kChunk = 16384 / static_cast<int>(sizeof(Level<T, kHard>));  // keys

template <typename T, bool kHard>
constexpr int kMaxSurvivors = kChunk<T, kHard> * 3 / 2;  // where there are more, the whole prefix is read again

template <typename T>
struct TableParams {
  Rows scores;            // columns of [B, Mk, G]
  Sequences sequences;    //
  int64_t batch, groups;  // B, G
  T* table;               // [B, G, Mk]
  int32_t* has_nan;       // [sequences, G], zeroed
};

// The threshold (soft) or the k-th highest level (hard) after each key.
template <typename T, bool kHard>
struct LevelParams {
  const T* table;  // [B, G, Mk]
  Sequences sequences;
  int64_t groups;
  Pattern pattern;
  int64_t num_keys;            // k
  Level<T, kHard>* survivors;  // [chunk starts, G, kMaxSurvivors]
  Level<T, kHard>* lower;      // [chunk starts, G] a lower bound of all later results; survivors are above it
  int32_t* survivor_count;     // [chunk starts, G], or kUncounted
  Level<T, kHard>* after_key;  // [B, G, Mk] the result; of a sequence that is not causal, only the last one is set
  static constexpr int32_t kUncounted = -1;
};

template <typename T>
struct OutputParams {
  const T* table;  // [B, G, Mk]
  Sequences sequences;
  int64_t batch, groups;  // B, G
  Pattern pattern;
  const T* soft;               // [B, G, Mk] thresholds after each key
  const Level<T, true>* hard;  // [B, G, Mk] the k-th highest after each key; null unless hard
  const int32_t* has_nan;      // [sequences, G]
  T* threshold;                // [B, G, Mq]
  int32_t* expiry;             // [B, G, Mk]
};

// Batch entries that are one sequence each, not causal.
template <typename T>
struct SequenceParams {
  Rows scores;  // columns of [B, Mk, G]
  int64_t batch, groups, queries, keys;
  int64_t num_keys;  // k
  bool hard;
  T* threshold;     // [B, G, Mq]
  int32_t* expiry;  // [B, G, Mk]
};

// Chunk starts but for the first ones, where nothing has survived yet.
inline int64_t chunk_starts(const Sequences& sequences, int64_t chunk) {
  return sequences.num_items(sequences.cu_k, sequences.keys, {chunk, 0});
}

// All of `select`; false, and nothing done, if the sequences are too long for it.
template <typename T>
bool launch_sequences(const SequenceParams<T>& params, cudaStream_t stream);

template <typename T>
void launch_table(const TableParams<T>& params, cudaStream_t stream);

template <typename T, bool kHard>
void launch_levels(const LevelParams<T, kHard>& params, cudaStream_t stream);

template <typename T>
void launch_outputs(const OutputParams<T>& params, cudaStream_t stream);

}  // namespace sparsek::cuda
