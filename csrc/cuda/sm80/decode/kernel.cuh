// Forward for few queries: a CTA takes one query of up to 8 heads of a group, and some of the keys. A warp looks for
// keys that are seen, lines them up, and attends to 16 of them at a time, from global memory straight to registers:
// keys and the columns of values are the rows of its products, and as the order of columns within a product is free, 16
// bytes of a row are what one lane needs.
#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/sm80/decode/launch.h"
#include "cuda/sm80/mma.cuh"

namespace sparsek::cuda::sm80 {

constexpr int kDecodeThreads = 32 * kDecodeWarps;
constexpr int kDecodeKeys = 16;              // of a step
constexpr int kScan = 64;                    // keys that a warp looks at together
constexpr int kQueue = kScan + kDecodeKeys;  // keys lined up, at most
constexpr float kDecodeLog2e = 1.4426950408889634f;
constexpr float kDecodeLn2 = 0.6931471805599453f;

template <int kWidth>
struct DecodeShared {
  float sums[kDecodeWarps][kDecodeHeads][kWidth + 4];  // of weighted values; padded against bank conflicts
  float2 weights[kDecodeWarps][kDecodeHeads];          // reference and sum
  int32_t key[kDecodeWarps][kQueue];                   // lined up
  float gate[kDecodeWarps][kQueue];
};

// Where a CTA is in the grid.
struct DecodeTile {
  int64_t batch, group, query, first_head;  // heads within the group
  int32_t heads, split;
  int64_t place;  // among [B, G, tiles, Mq]

  __device__ static DecodeTile of(const DecodeArguments& a, int64_t index, int32_t split) {
    const ForwardParams<float>& p = a.params;
    DecodeTile tile;
    tile.place = index;
    tile.split = split;
    tile.query = index % p.queries;
    index /= p.queries;
    tile.first_head = index % a.tiles * a.heads;
    index /= a.tiles;
    tile.group = index % p.groups;
    tile.batch = index / p.groups;
    tile.heads = static_cast<int32_t>(min(p.heads_per_group - tile.first_head, static_cast<int64_t>(a.heads)));
    return tile;
  }
  __device__ int64_t head(const DecodeArguments& a, int index) const {
    return group * a.params.heads_per_group + first_head + index;
  }
  __device__ float threshold(const DecodeArguments& a) const {
    return a.params.threshold[(batch * a.params.groups + group) * a.params.queries + query];
  }
};

template <typename Element, int kWidth>
class Decoder {
 public:
  using Shared = DecodeShared<kWidth>;

  __device__ Decoder(const DecodeArguments& a, Shared& shared, const DecodeTile& tile)
      : a_(a),
        p_(a.params),
        s_(shared),
        tile_(tile),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        position_(static_cast<int32_t>(tile.query + p_.keys - p_.queries)),
        scores_(a.columns.row(tile.batch, 0, tile.group)),
        key_(p_.key.row(tile.batch, 0, tile.group)),
        value_(p_.value.row(tile.batch, 0, tile.group)),
        threshold_(a.params.pattern.hard ? 0.0f : fminf(tile.threshold(a), FLT_MAX)) {}

  __device__ void run() {
    load_queries();
#pragma unroll
    for (int e = 0; e < 2; ++e) reference_[e] = -FLT_MAX, sum_[e] = 0.0f;
#pragma unroll
    for (auto& tile : out_)
#pragma unroll
      for (float& x : tile) x = 0.0f;
    attend();
    store();
  }

 private:
  static constexpr int64_t kElement = sizeof(Element);
  static constexpr int kSegments = kWidth / 32;  // of 32 columns: 8 for each of the four lanes of a key
  static constexpr int kGroups = kWidth / 64;    // of 64 columns of values: 8 for each of eight lanes

  // What a lane needs of 16 keys: of rows n = lane / 4 and n + 8 of K, and of rows 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 of
  // V, with c = lane % 4.
  struct Step {
    uint4 key[2][kSegments], value[4][kGroups];
    float gate[2];  // of keys n and n + 8
  };

  // Of head `lane / 4`, as the columns of the keys lie.
  __device__ void load_queries() {
    const int head = lane_ / 4;
    const char* from = p_.query.row(tile_.batch, tile_.query, tile_.head(a_, head < tile_.heads ? head : 0));
#pragma unroll
    for (int s = 0; s < kSegments; ++s)
      query_[s] = load(from, head < tile_.heads, 32 * s + 8 * (lane_ % 4), p_.query.width);
  }

  // Eight elements from `column` on, or zeros.
  __device__ static uint4 load(const char* row, bool exists, int column, int64_t width) {
    if (!exists || column >= width) return {0, 0, 0, 0};
    return __ldg(reinterpret_cast<const uint4*>(row + 2 * column));
  }

  __device__ void attend() {
    const int32_t share = a_.split_size / kDecodeWarps,
                  end = min(share * (kDecodeWarps * tile_.split + warp_ + 1), static_cast<int32_t>(p_.keys));
    int32_t base = share * (kDecodeWarps * tile_.split + warp_);
    int32_t* const key = s_.key[warp_];
    float* const gate = s_.gate[warp_];
    int first = 0, filled = 0;  // keys [first, filled) are lined up
    float ahead[kScan / 32];    // gates of the keys that are looked at next
    const auto look = [&] {
#pragma unroll
      for (int i = 0; i < kScan / 32; ++i) {
        const int32_t j = base + 32 * i + lane_;
        ahead[i] = j < end ? gate_of(j) : 0.0f;
      }
    };
    const auto line_up = [&] {
      while (filled - first < kDecodeKeys && base < end) {
        __syncwarp();
        const int left = filled - first;
        const int32_t left_key = lane_ < left ? key[first + lane_] : 0;
        const float left_gate = lane_ < left ? gate[first + lane_] : 0.0f;
        __syncwarp();
        if (lane_ < left) key[lane_] = left_key, gate[lane_] = left_gate;
        first = 0, filled = left;
#pragma unroll
        for (int i = 0; i < kScan / 32; ++i) {
          const uint32_t seen = __ballot_sync(~0u, ahead[i] > 0.0f);
          const int slot = filled + __popc(seen & ((1u << lane_) - 1));
          if (ahead[i] > 0.0f) key[slot] = base + 32 * i + lane_, gate[slot] = ahead[i];
          filled += __popc(seen);
        }
        base += kScan;
        look();
        __syncwarp();
      }
    };
    const auto fetch = [&](Step& step) {
      load_step(step, key + first, gate + first, min(filled - first, kDecodeKeys));
      first = min(first + kDecodeKeys, filled);
    };
    look();
    line_up();
    while (filled > first) {
      Step step;  // one at a time: further CTAs on the processor have theirs on the way
      fetch(step);
      line_up();
      attend_to(step);
    }
  }

  __device__ float gate_of(int32_t key) const {
    const Pattern& pattern = p_.pattern;
    if (pattern.causal && key > position_) return 0.0f;
    if (pattern.causal && key > position_ - pattern.window) return 1.0f;
    if (pattern.hard) {
      const int32_t expiry = p_.expiry[(tile_.batch * p_.groups + tile_.group) * p_.keys + key];
      return (pattern.causal ? expiry > position_ : expiry == kNever) ? 1.0f : 0.0f;
    }
    const float score = *reinterpret_cast<const float*>(scores_ + key * a_.columns.stride[1] * int64_t{sizeof(float)});
    return __saturatef(score - threshold_);
  }

  // Starts the loads of `count` keys, up to 16.
  __device__ void load_step(Step& step, const int32_t* key, const float* gate, int count) const {
    const int n = lane_ / 4, c = lane_ % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int slot = n + 8 * h;
      const bool exists = slot < count;
      const char* row = key_ + (exists ? key[slot] : 0) * p_.key.stride[1] * kElement;
      step.gate[h] = exists ? gate[slot] : 0.0f;
#pragma unroll
      for (int s = 0; s < kSegments; ++s) step.key[h][s] = load(row, exists, 32 * s + 8 * c, p_.key.width);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int slot = 2 * c + i % 2 + i / 2 * 8;
      const bool exists = slot < count;
      const char* row = value_ + (exists ? key[slot] : 0) * p_.value.stride[1] * kElement;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) step.value[i][g] = load(row, exists, 64 * g + 8 * n, p_.value.width);
    }
  }

  __device__ void attend_to(const Step& step) {
    float logits[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // of keys n and n + 8, each with heads 2 c and 2 c + 1
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      const uint4 &low = step.key[0][s], &high = step.key[1][s], &q = query_[s];
      multiply_add<Element>(logits, {low.x, high.x, low.y, high.y}, q.x, q.y);
      multiply_add<Element>(logits, {low.z, high.z, low.w, high.w}, q.z, q.w);
    }
    uint32_t weights[2];
    weigh(logits, step.gate, weights);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const uint32_t* v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = reinterpret_cast<const uint32_t*>(&step.value[i][g]);
#pragma unroll
      for (int t = 0; t < 4; ++t)  // columns 8 n + 2 t and the next
        multiply_add<Element>(out_[4 * g + t],
                              {__byte_perm(v[0][t], v[1][t], 0x5410), __byte_perm(v[0][t], v[1][t], 0x7632),
                               __byte_perm(v[2][t], v[3][t], 0x5410), __byte_perm(v[2][t], v[3][t], 0x7632)},
                              weights[0], weights[1]);
    }
  }

  // Softmax weights of the logits, as a right factor, and earlier sums relative to the same maximum.
  __device__ void weigh(const float (&logits)[4], const float (&gate)[2], uint32_t (&weights)[2]) {
    const float scale = static_cast<float>(p_.scale) * kDecodeLog2e;
    float weight[2][2];  // by key and head
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float highest = reference_[e];
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (gate[h] > 0.0f) highest = fmaxf(highest, logits[2 * h + e] * scale);
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, mask));
      const float decay = exp2_fast(reference_[e] - highest);
      reference_[e] = highest;
      sum_[e] *= decay;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        weight[h][e] = gate[h] > 0.0f ? gate[h] * exp2_fast(logits[2 * h + e] * scale - highest) : 0.0f;
        sum_[e] += weight[h][e];
      }
#pragma unroll
      for (auto& tile : out_) tile[e] *= decay, tile[2 + e] *= decay;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) weights[h] = transpose_pairs(pack<Element>(weight[h][0], weight[h][1]));
  }

  // Puts the warps' sums together.
  __device__ void store() {
    const int n = lane_ / 4, c = lane_ % 4;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = sum_[e];
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
      if (n == 0) s_.weights[warp_][2 * c + e] = {reference_[e], sum};
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            s_.sums[warp_][2 * c + e][64 * g + 8 * n + 2 * t + h] = out_[4 * g + t][2 * h + e];
    }
    __syncthreads();
    const int width = static_cast<int>(p_.value.width);
    for (int i = threadIdx.x; i < tile_.heads * width; i += kDecodeThreads) {
      const int head = i / width, column = i - head * width;
      float highest = -FLT_MAX, sum = 0.0f, out = 0.0f;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) highest = fmaxf(highest, s_.weights[w][head].x);
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        const float factor = exp2_fast(s_.weights[w][head].x - highest);
        sum += factor * s_.weights[w][head].y;
        out += factor * s_.sums[w][head][column];
      }
      finish(head, column, highest, sum, out);
    }
  }

  __device__ void finish(int head, int column, float highest, float sum, float out) const;

  const DecodeArguments& a_;
  const ForwardParams<float>& p_;
  Shared& s_;
  const DecodeTile& tile_;
  const int warp_, lane_;
  const int32_t position_;                                // of the query among the keys
  const char *const scores_, *const key_, *const value_;  // of key 0
  const float threshold_;                                 // finite, so that pinned keys, of score +inf, stay above
  uint4 query_[kSegments];
  float reference_[2], sum_[2];  // of heads 2 c and 2 c + 1; the sum over keys n and n + 8
  float out_[kWidth / 16][4];    // columns 64 g + 8 n + 2 t and the next, each of heads 2 c and 2 c + 1
};

// Writes an element of the output and, once a head, the LSE.
template <typename Element>
__device__ void write_result(const DecodeArguments& a, const DecodeTile& tile, int head, int column, float reference,
                             float sum, float out) {
  const ForwardParams<float>& p = a.params;
  const float threshold = tile.threshold(a);
  const bool is_nan = threshold != threshold;  // NaN scores
  const float result = is_nan ? NAN : sum == 0.0f ? 0.0f : __fdividef(out, sum);
  char* to = p.out.row(tile.batch, tile.query, tile.head(a, head));
  if (p.out.element_size == sizeof(float)) {
    reinterpret_cast<float*>(to)[column] = result;
  } else {
    reinterpret_cast<Element*>(to)[column] = static_cast<Element>(result);
  }
  if (column == 0)
    p.lse[(tile.batch * p.groups * p.heads_per_group + tile.head(a, head)) * p.queries + tile.query] =
        is_nan || sum != sum ? NAN
        : sum == 0.0f        ? -INFINITY
                             : (reference + log2f(sum)) * kDecodeLn2;
}

template <typename Element, int kWidth>
__device__ void Decoder<Element, kWidth>::finish(int head, int column, float highest, float sum, float out) const {
  if (a_.partial == nullptr) return write_result<Element>(a_, tile_, head, column, highest, sum, out);
  const int64_t place = (tile_.place * a_.splits + tile_.split) * a_.heads + head;
  a_.partial[place * p_.value.width + column] = out;
  if (column == 0) a_.weights[place] = {highest, sum};
}

template <typename Element, int kWidth>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeResident) decode(const __grid_constant__ DecodeArguments a) {
  auto& shared = shared_memory<DecodeShared<kWidth>>();
  const int64_t index = blockIdx.x / a.splits;
  const DecodeTile tile = DecodeTile::of(a, index, static_cast<int32_t>(blockIdx.x - index * a.splits));
  Decoder<Element, kWidth>(a, shared, tile).run();
}

// Puts the parts of one query and head together, in their order: a warp for each.
template <typename Element>
__global__ void __launch_bounds__(32) combine_splits(const __grid_constant__ DecodeArguments a) {
  constexpr int kAtOnce = 8;  // parts whose loads are under way together
  const int64_t index = blockIdx.x / a.heads;
  const DecodeTile tile = DecodeTile::of(a, index, 0);
  const int head = static_cast<int>(blockIdx.x - index * a.heads), lane = threadIdx.x, column = 4 * lane;
  if (head >= tile.heads) return;
  const int64_t first = index * a.splits * a.heads + head, width = a.params.value.width;
  float4 parts[kAtOnce];
  const auto load = [&](int32_t begin) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (begin + i < a.splits && column < width)
        parts[i] = *reinterpret_cast<const float4*>(a.partial + (first + (begin + i) * a.heads) * width + column);
  };
  load(0);
  float2 weights[kMostSplits / 32];
  float highest = -FLT_MAX, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kMostSplits / 32; ++i) {
    const int split = 32 * i + lane;
    weights[i] = split < a.splits ? a.weights[first + split * a.heads] : float2{-FLT_MAX, 0.0f};
    highest = fmaxf(highest, weights[i].x);
  }
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, mask));
  float factors[kMostSplits / 32];
  static_assert(kMostSplits == 64);
#pragma unroll
  for (int i = 0; i < kMostSplits / 32; ++i) {
    factors[i] = weights[i].y == 0.0f ? 0.0f : exp2_fast(weights[i].x - highest);
    sum += factors[i] * weights[i].y;
  }
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  float out[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int32_t begin = 0; begin < a.splits; begin += kAtOnce) {
    if (begin > 0) load(begin);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float factor = __shfl_sync(~0u, begin < 32 ? factors[0] : factors[1], (begin + i) % 32);
      if (begin + i >= a.splits) break;
      out[0] = fmaf(factor, parts[i].x, out[0]);
      out[1] = fmaf(factor, parts[i].y, out[1]);
      out[2] = fmaf(factor, parts[i].z, out[2]);
      out[3] = fmaf(factor, parts[i].w, out[3]);
    }
  }
  if (column >= width) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) write_result<Element>(a, tile, head, column + i, highest, sum, out[i]);
}

template <typename Element, int kWidth>
void launch_decode(const DecodeArguments& arguments, cudaStream_t stream) {
  const ForwardParams<float>& p = arguments.params;
  const int64_t tiles = p.batch * p.groups * arguments.tiles * p.queries;
  launch("decode", decode<Element, kWidth>, tiles * arguments.splits, kDecodeThreads, sizeof(DecodeShared<kWidth>),
         stream, arguments);
  if (arguments.partial != nullptr)
    launch("combine_splits", combine_splits<Element>, tiles * arguments.heads, 32, 0, stream, arguments);
}

}  // namespace sparsek::cuda::sm80
