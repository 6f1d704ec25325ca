// A c10 allocator that counts every byte of CPU tensor memory, on every thread, and can refuse to pass a cap.
//
// It hands out memory of c10's own default allocator and keeps reporting to torch's profiler, so both figures can be compared
// in one run. Sizes are kept beside the blocks, not inside, because c10 demands that data and context of a block be the same pointer.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <unordered_map>

namespace {

std::mutex sizes_mutex;
std::unordered_map<void*, int64_t> sizes;
std::atomic<int64_t> live_nbytes{0};
std::atomic<int64_t> peak_nbytes{0};
std::atomic<int64_t> cap_nbytes{INT64_MAX};

void raise_peak(int64_t now) {
  int64_t seen = peak_nbytes.load();
  while (now > seen && !peak_nbytes.compare_exchange_weak(seen, now)) {
  }
}

// 0 for a block this allocator did not hand out: it was allocated before the hook was installed and never counted.
int64_t forget(void* block) {
  const std::lock_guard<std::mutex> lock(sizes_mutex);
  const auto found = sizes.find(block);
  if (found == sizes.end()) {
    return 0;
  }
  const int64_t nbytes = found->second;
  sizes.erase(found);
  return nbytes;
}

void release(void* block) {
  if (block == nullptr) {
    return;
  }
  c10::profiledCPUMemoryReporter().Delete(block);
  // Forget before freeing: another thread may be handed the same address at once.
  const int64_t nbytes = forget(block);
  c10::free_cpu(block);
  live_nbytes.fetch_sub(nbytes);
}

// Reserve first, so that two threads cannot both take the last bytes under the cap.
int64_t reserve(int64_t nbytes) {
  const int64_t now = live_nbytes.fetch_add(nbytes) + nbytes;
  const int64_t cap = cap_nbytes.load();
  if (now > cap) {
    live_nbytes.fetch_sub(nbytes);
    TORCH_CHECK_WITH(OutOfMemoryError, false, "cap of ", cap, " bytes: ", now - nbytes, " live, ", nbytes, " more requested");
  }
  return now;
}

class CountingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    const auto nbytes = static_cast<int64_t>(size);
    const int64_t now = reserve(nbytes);
    void* block = nullptr;
    try {
      block = c10::alloc_cpu(size);
      if (block != nullptr) {
        const std::lock_guard<std::mutex> lock(sizes_mutex);
        sizes.emplace(block, nbytes);
      }
    } catch (...) {
      c10::free_cpu(block);
      live_nbytes.fetch_sub(nbytes);
      throw;
    }
    raise_peak(now);
    c10::profiledCPUMemoryReporter().New(block, size);
    return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }

  void copy_data(void* target, const void* source, size_t size) const override {
    default_copy_data(target, source, size);
  }
};

CountingAllocator allocator;

}  // namespace

extern "C" {

// Above the priority of c10's own allocators (0 .. 100), so nothing that loads later takes the place back.
void allocator_install() {
  c10::SetAllocator(c10::DeviceType::CPU, &allocator, 200);
}

int64_t allocator_live() {
  return live_nbytes.load();
}

int64_t allocator_peak() {
  return peak_nbytes.load();
}

void allocator_reset() {
  peak_nbytes.store(live_nbytes.load());
}

void allocator_cap(int64_t nbytes) {
  cap_nbytes.store(nbytes);
}
}
