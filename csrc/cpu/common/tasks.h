// Tasks handed out in order to PyTorch's threads, with results that may have to be added up in that order too.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <vector>

namespace sparsek::cpu {

// Lets the tasks of one stream finish in order. Tasks are handed out in order, so the one being waited for always runs.
class Turns {
 public:
  explicit Turns(size_t streams) : next_(streams, 0) {}

  // Runs `finish` once all earlier tasks of the stream have run theirs.
  template <typename Finish>
  void in_order(size_t stream, int64_t index, const Finish& finish) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [&] { return next_[stream] == index || abandoned_; });
      if (abandoned_) return;
    }
    finish();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      next_[stream] = index + 1;
    }
    changed_.notify_all();
  }

  // After a failure nobody's turn comes any more.
  void abandon() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      abandoned_ = true;
    }
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<int64_t> next_;
  bool abandoned_ = false;
};

// Calls make_worker() once per thread, and the worker with every index in 0 .. count - 1 that the thread takes.
template <typename MakeWorker>
void run_tasks(int64_t count, const MakeWorker& make_worker, Turns* turns = nullptr) {
  if (count == 0) return;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;
  // One chunk per thread even for few tasks: inside a parallel region BLAS uses one thread, so results do not depend on
  // how many tasks there are.
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    try {
      auto worker = make_worker();
      for (int64_t i = next++; i < count; i = next++) worker(i);
    } catch (...) {
      {
        std::lock_guard<std::mutex> lock(mutex);
        failure = std::current_exception();
      }
      next = count;
      if (turns != nullptr) turns->abandon();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace sparsek::cpu
