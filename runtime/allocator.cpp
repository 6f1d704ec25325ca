// A c10 allocator that counts every byte of CPU tensor memory, on every thread, and can refuse to pass a cap.
//
// It hands out the blocks of the allocator that was in its place before, which keeps reporting to torch's profiler. What owns a
// block is kept beside it in a table, because c10 demands that data and context of a block be the same pointer.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/Exception.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <utility>

#include <pthread.h>

namespace {

struct Block {
  int64_t nbytes;
  c10::DataPtr owner;
};

// Never destroyed: tensors outlive static destructors.
std::mutex& blocks_mutex = *new std::mutex();
auto& blocks = *new std::unordered_map<void*, Block>();
c10::Allocator* below = nullptr;

// Each reader has a peak of its own, so that no one's reset takes another's maximum away.
constexpr int kPeaks = 16;
std::atomic<int64_t> live_nbytes{0};
std::array<std::atomic<int64_t>, kPeaks> peaks{};
std::atomic<int> peaks_used{0};
std::atomic<int64_t> cap_nbytes{INT64_MAX};

void raise_peaks(int64_t now) {
  const int used = peaks_used.load();
  for (int i = 0; i < used; ++i) {
    int64_t seen = peaks[i].load();
    while (now > seen && !peaks[i].compare_exchange_weak(seen, now)) {
    }
  }
}

void release(void* data) {
  if (data == nullptr) {
    return;
  }
  c10::DataPtr owner;
  {
    const std::lock_guard<std::mutex> lock(blocks_mutex);
    auto found = blocks.find(data);
    live_nbytes.fetch_sub(found->second.nbytes);
    owner = std::move(found->second.owner);
    blocks.erase(found);
  }
  // Freed here, after it was forgotten: another thread may be handed the same address at once.
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
    void* data = nullptr;
    try {
      c10::DataPtr owner = below->allocate(size);
      data = owner.get();
      if (data != nullptr) {
        const std::lock_guard<std::mutex> lock(blocks_mutex);
        blocks.emplace(data, Block{nbytes, std::move(owner)});
      }
    } catch (...) {
      live_nbytes.fetch_sub(nbytes);
      throw;
    }
    raise_peaks(now);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }

  void copy_data(void* target, const void* source, size_t size) const override {
    default_copy_data(target, source, size);
  }
};

CountingAllocator& allocator = *new CountingAllocator();

// Above the priority of c10's own allocators (0 .. 100), so nothing that loads later takes the place back.
constexpr uint8_t kPriority = 200;

}  // namespace

extern "C" {

// 0 if it is in place already.
int allocator_install() {
  // A child process must not inherit the table locked by a thread that it does not have.
  static const int once = pthread_atfork([] { blocks_mutex.lock(); }, [] { blocks_mutex.unlock(); }, [] { blocks_mutex.unlock(); });
  TORCH_CHECK(once == 0, "pthread_atfork: error ", once);
  c10::Allocator* current = c10::GetCPUAllocator();
  if (current == &allocator) {
    return 0;
  }
  below = current;
  c10::SetAllocator(c10::DeviceType::CPU, &allocator, kPriority);
  return 1;
}

// 0 if another allocator has its place. Blocks it handed out stay counted until they are freed.
int allocator_remove() {
  if (c10::GetCPUAllocator() != &allocator) {
    return 0;
  }
  c10::SetAllocator(c10::DeviceType::CPU, below, kPriority);
  return 1;
}

// Count a storage from before the hook, and whatever it is resized to. The bytes; 0 for one that is counted already or is not a
// plain block of the allocator below (shared, mapped, copied on write), whose deleter others compare.
int64_t allocator_adopt(void* pointer) {
  auto* storage = static_cast<c10::StorageImpl*>(pointer);
  c10::DataPtr& data = storage->_mutable_data_ptr_no_checks();
  if (below == nullptr || data.get() == nullptr || data.get() != data.get_context() || data.get_deleter() != below->raw_deleter()) {
    return 0;
  }
  const auto nbytes = static_cast<int64_t>(storage->nbytes());
  {
    const std::lock_guard<std::mutex> lock(blocks_mutex);
    void* block = data.get();
    auto owner = std::exchange(data, c10::DataPtr(block, block, &release, c10::Device(c10::DeviceType::CPU)));
    blocks.emplace(block, Block{nbytes, std::move(owner)});
  }
  if (storage->allocator() == below) {
    storage->set_allocator(&allocator);
  }
  raise_peaks(live_nbytes.fetch_add(nbytes) + nbytes);
  return nbytes;
}

int64_t allocator_live() {
  return live_nbytes.load();
}

// The number of a peak of one's own, -1 if there are none left.
int allocator_open_peak() {
  static std::mutex opening;
  const std::lock_guard<std::mutex> lock(opening);
  const int number = peaks_used.load();
  if (number == kPeaks) {
    return -1;
  }
  peaks[number].store(live_nbytes.load());
  peaks_used.store(number + 1);
  return number;
}

int64_t allocator_peak(int number) {
  return peaks[number].load();
}

void allocator_reset_peak(int number) {
  peaks[number].store(live_nbytes.load());
}

void allocator_cap(int64_t nbytes) {
  cap_nbytes.store(nbytes);
}
}
