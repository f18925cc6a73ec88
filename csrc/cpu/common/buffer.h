// Scratch memory of one thread.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace sparsek::cpu {

// Uninitialised elements on a cache line boundary: BLAS gives the same bits for the same alignment.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) { reserve(size); }

  // Makes room for `size` elements; the contents are lost if it has to grow.
  void reserve(int64_t size) {
    if (size <= size_) return;
    const size_t bytes = (size * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    data_.reset(static_cast<T*>(std::aligned_alloc(kAlignment, bytes)));
    if (data_ == nullptr) throw std::bad_alloc();
    size_ = size;
  }

  T* data() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static constexpr size_t kAlignment = 64;

  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

}  // namespace sparsek::cpu
