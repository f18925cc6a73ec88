// The scout: a warp that looks up each unit of keys.
#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/sm90/backward/traits.cuh"
#include "cuda/sm90/ptx.cuh"

namespace sparsek::cuda::sm90 {

template <typename Traits>
class Scout {
 public:
  __device__ Scout(const BackwardArguments& a, typename Traits::Shared& shared)
      : a_(a), p_(a.params), s_(shared), lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ void run() {
    Ring<Traits::kUnits> units;
    Ring<1> wanted;
    while (true) {
      barrier_wait(s_.unit_empty[units.place], units.phase ^ 1);
      Unit& unit = s_.units[units.place];
      const bool found = find(unit);
      if (lane_ == 0) unit.done = !found;
      barrier_arrive_as_warp(s_.unit_full[units.place], lane_);
      if (!found) return;
      units.advance();
      // Not earlier: others might wait for this unit.
      barrier_wait(s_.unit_wanted, wanted.phase);
      wanted.advance();
    }
  }

 private:
  static constexpr int kSlotsOfLane = kKeys / 32;

  __device__ bool find(Unit& unit) {
    while (true) {
      int32_t ticket = 0;
      if (lane_ == 0) ticket = atomicAdd(a_.ticket, 1);
      ticket = __shfl_sync(~0u, ticket, 0);
      const int64_t most = a_.windows ? a_.num_blocks * p_.groups : a_.first_unit[a_.num_runs * packs()];
      if (ticket >= most) return false;
      // All lanes write the same.
      unit.windows = a_.windows;
      if (!(a_.windows ? find_window(unit, ticket) : find_list(unit, ticket))) continue;
      __syncwarp();
      if (Traits::kCareful && a_.suspects[unit.sequence.batch * p_.groups + unit.group] == 0) continue;
      const TileRange tiles = find_tiles<Traits::kRows>(unit, p_.pattern, unit.number);
      unit.first_tile = tiles.begin;
      unit.end_tile = tiles.end;
      if (a_.windows) {
        fill_window(unit);
      } else {
        fill_list(unit);
      }
      return true;
    }
  }

  __device__ int64_t packs() const { return (p_.groups + kPack - 1) / kPack; }

  // What follows from the sequence and the group. Later units come first: then those that start at later tiles are done
  // with these when the others arrive there.
  __device__ void place(Unit& unit, int64_t s, int64_t group) const {
    const Sequence sequence = p_.sequences.at(s);
    const int32_t shift = p_.pattern.causal ? sequence.shift() : 0;
    const int64_t query = sequence.query_begin - shift, head = group * p_.heads_per_group;
    constexpr int32_t kRows = Traits::kRows;
    unit.sequence = sequence;
    unit.group = group;
    unit.lse_row = (sequence.batch * p_.groups * p_.heads_per_group + head) * p_.queries + query;
    unit.threshold_row = (sequence.batch * p_.groups + group) * p_.queries + query;
    unit.column = (sequence.batch * p_.groups + group) * p_.keys + sequence.key_begin;
    unit.tile = p_.sequences.first_item(p_.sequences.cu_q, p_.queries, a_.tiles, s) -
                (shift < 0 ? (shift - kRows + 1) / kRows : shift / kRows);
  }

  __device__ bool find_window(Unit& unit, int32_t ticket) const {
    constexpr Items kBlocks{kKeys, 1};
    const int64_t item = a_.num_blocks - 1 - divide(ticket, p_.groups);
    const int64_t s = p_.sequences.find(p_.sequences.cu_k, p_.keys, kBlocks, item);
    const int64_t block = item - p_.sequences.first_item(p_.sequences.cu_k, p_.keys, kBlocks, s);
    place(unit, s, static_cast<uint32_t>(ticket) % static_cast<uint32_t>(p_.groups));
    const int32_t keys = unit.sequence.keys;
    if (block * kKeys >= keys) return false;
    unit.number = static_cast<int32_t>(block);
    unit.count = (keys + kKeys - 1) / kKeys;
    unit.view = RunView{};
    unit.units_before = 0;
    unit.first_query = max(unit.sequence.shift(), 0);
    unit.end_query = keys;
    return true;
  }

  __device__ void fill_window(Unit& unit) const {
    const int32_t first = unit.number * kKeys;
    unit.all_entered = kNever;
    unit.open_score = -INFINITY;
    for (int i = lane_; i < kKeys; i += 32) {
      const bool exists = first + i < unit.sequence.keys;
      unit.key[i] = exists ? first + i : -1;
      unit.from[i] = exists ? first + i : kNever;
      unit.mode[i] = exists ? kStore : kSkip;
    }
  }

  __device__ bool find_list(Unit& unit, int32_t ticket) const {
    // The last pack that begins no later than the ticket.
    int64_t low = 0, high = a_.num_runs * packs();
    while (high - low > 1) {
      const int64_t step = (high - low + 31) / 32, at = low + (lane_ + 1) * step;
      const int64_t before = __popc(__ballot_sync(~0u, at < high && a_.first_unit[at] <= ticket));
      high = min(low + (before + 1) * step, high);
      low += before * step;
    }
    const uint32_t run = divide(low, packs()), first = (low - run * packs()) * kPack;
    const uint32_t size = min(static_cast<int64_t>(kPack), p_.groups - first);
    const uint32_t index = ticket - a_.first_unit[low], position = index / size, group = first + index % size;
    unit.run = a_.num_runs - 1 - run;
    const int64_t s = p_.sequences.find(p_.sequences.cu_k, p_.keys, a_.plan.runs, unit.run);
    const int64_t r = unit.run - p_.sequences.first_item(p_.sequences.cu_k, p_.keys, a_.plan.runs, s);
    place(unit, s, group);
    const Sequence& sequence = unit.sequence;
    const bool causal = p_.pattern.causal;
    const int64_t begin = causal ? r * a_.plan.runs.size : 0;
    const int64_t end = causal ? min(begin + a_.plan.runs.size, static_cast<int64_t>(sequence.keys)) : sequence.queries;
    unit.view = find_run(p_, a_.plan, sequence, s, group, static_cast<int32_t>(begin));
    if (!causal) unit.view.entering = unit.view.count;
    unit.count = (unit.view.count + kKeys - 1) / kKeys;
    unit.number = unit.count - 1 - static_cast<int32_t>(position);
    if (unit.number < 0) return false;
    unit.first_query = causal ? max(static_cast<int32_t>(begin), max(sequence.shift(), 0)) : 0;
    unit.end_query = static_cast<int32_t>(end);
    const bool follows = causal && end < sequence.keys;
    unit.units_before = follows ? count_units(a_, unit.run + 1, group) : 0;
    return true;
  }

  __device__ void fill_list(Unit& unit) const {
    const RunView& view = unit.view;
    const int32_t first = unit.number * kKeys, last = min(first + kKeys, view.count) - 1;
    const auto from_position = [&](int32_t slot, int32_t key) -> int32_t {
      if (slot < view.entering) return std::numeric_limits<int32_t>::min();
      return static_cast<int32_t>(min(key + p_.pattern.window, static_cast<int64_t>(kNever)));
    };
    unit.all_entered = from_position(last, view.key_of(last));
    const bool may_open = !p_.pattern.hard && view.block_score != nullptr && first + kKeys <= view.count;
    unit.open_score =
        may_open ? fminf(view.block_score[2 * unit.number], view.block_score[2 * unit.number + 1]) : -INFINITY;
#pragma unroll
    for (int n = 0; n < kSlotsOfLane; ++n) {
      const int i = lane_ + 32 * n;
      const int32_t slot = first + i, key = slot <= last ? view.key_of(slot) : -1;
      unit.key[i] = key;
      unit.score[i] = key < 0 ? -INFINITY : view.score_of(slot);
      unit.soft_score[i] = key >= 0 && p_.pattern.hard ? p_.scores[unit.column + key] : -INFINITY;
      unit.from[i] = key < 0 ? kNever : from_position(slot, key);
      unit.mode[i] = key < 0 ? kSkip : mode_of(unit, key);
    }
  }

  // The last run that lists a key is the first to sum its gradient, unless windows were before.
  __device__ Mode mode_of(const Unit& unit, int32_t key) const {
    if (p_.pattern.window > 0) return kAdd;
    if (!p_.pattern.causal) return kStore;
    const int32_t expiry = p_.expiry[unit.column + key];
    if (expiry <= max(key, unit.first_query)) return kSkip;  // in dense runs
    return expiry <= unit.end_query || unit.end_query == unit.sequence.keys ? kStore : kAdd;
  }

  const BackwardArguments& a_;
  const BackwardParams<float>& p_;
  typename Traits::Shared& s_;
  const int lane_;
};

}  // namespace sparsek::cuda::sm90
