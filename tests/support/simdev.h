// Streams and memory of the simulated accelerator.
//
// Memory is filled with 0xFF (NaN) when it is handed out and when it is given back, both in stream order, so a read that should have
// waited, and a block that was freed too early, show in the numbers.

#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Stream.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <future>
#include <map>
#include <thread>
#include <unordered_map>

namespace {

constexpr auto kSim = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kSim, 0);

// ---- streams: one thread each, jobs in order. Never destroyed: threads outlive static destructors.

class Queue {
 public:
  Queue() {
    std::thread([this] { work(); }).detach();
  }
  void push(std::function<void()> job) {
    const std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back(std::move(job));
    changed_.notify_all();
  }
  bool idle() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return jobs_.empty();
  }
  void drain() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return jobs_.empty(); });
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return !jobs_.empty(); });
      auto job = std::move(jobs_.front());
      lock.unlock();
      job();
      job = nullptr;  // what it holds is let go before anyone may think it is done
      lock.lock();
      jobs_.pop_front();
      changed_.notify_all();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> jobs_;
};

thread_local c10::StreamId current_stream = 0;
std::mutex queues_mutex;
std::deque<Queue*> queues{new Queue()};

Queue& queue(c10::StreamId id) {
  const std::lock_guard<std::mutex> lock(queues_mutex);
  return *queues.at(id);
}

c10::StreamId new_queue() {
  const std::lock_guard<std::mutex> lock(queues_mutex);
  queues.push_back(new Queue());
  return static_cast<c10::StreamId>(queues.size()) - 1;
}

void drain_all() {
  for (size_t id = 0; id < queues.size(); ++id) {
    queue(static_cast<c10::StreamId>(id)).drain();
  }
}

// A point in a stream: done when the stream has come there.
using Point = std::shared_future<std::chrono::steady_clock::time_point>;

Point mark(c10::StreamId id) {
  auto promise = std::make_shared<std::promise<std::chrono::steady_clock::time_point>>();
  queue(id).push([promise] { promise->set_value(std::chrono::steady_clock::now()); });
  return promise->get_future().share();
}

// ---- memory

void release(void* block);

struct Block {
  void* data;
  size_t nbytes;
  c10::StreamId stream;
  std::vector<c10::StreamId> readers;  // record_stream
};

class Memory final : public c10::DeviceAllocator {
 public:
  std::atomic<size_t> capacity{0};  // 0: no limit
  std::atomic<size_t> granularity{1};

  c10::DataPtr allocate(size_t size) override {
    const size_t step = granularity;
    const size_t nbytes = (size + step - 1) / step * step;
    void* data = nullptr;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      TORCH_CHECK_WITH(OutOfMemoryError, !capacity || live_ + nbytes <= capacity, "sim: ", nbytes, " bytes wanted, ", live_, " of ", capacity.load(), " in use");
      live_ += nbytes;
      peak_ = std::max(peak_, live_);
      auto& free = free_[nbytes];
      if (!free.empty()) {
        data = free.back();
        free.pop_back();
      }
    }
    if (data == nullptr) {
      TORCH_CHECK(posix_memalign(&data, 64, std::max<size_t>(nbytes, 1)) == 0);
      // Nothing queued knows a new block, and the job below comes late where the stream's thread does not run yet: who reads too early
      // would see what the host has left there.
      std::memset(data, 0xFF, nbytes);
    }
    queue(current_stream).push([data, nbytes] { std::memset(data, 0xFF, nbytes); });
    return {data, new Block{data, nbytes, current_stream, {}}, &release, kDevice};
  }
  // The bytes are free for accounting at once, and for reuse when the owner and all recorded readers have come this far.
  void give_back(Block* block) {
    const std::unique_ptr<Block> owned(block);
    std::vector<Point> points;
    for (const auto reader : block->readers) {
      points.push_back(mark(reader));
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      live_ -= block->nbytes;
    }
    queue(block->stream).push([this, points, data = block->data, nbytes = block->nbytes] {
      for (const auto& point : points) {
        point.wait();
      }
      std::memset(data, 0xFF, nbytes);
      const std::lock_guard<std::mutex> lock(mutex_);
      free_[nbytes].push_back(data);
    });
  }
  void recordStream(const c10::DataPtr& ptr, c10::Stream stream) override {
    auto* block = static_cast<Block*>(ptr.get_context());
    if (block != nullptr && stream.id() != block->stream) {
      block->readers.push_back(stream.id());
    }
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    c10::CachingDeviceAllocator::DeviceStats stats;
    stats.allocated_bytes[0].current = static_cast<int64_t>(live_);
    stats.allocated_bytes[0].peak = static_cast<int64_t>(peak_);
    return stats;
  }
  void resetPeakStats(c10::DeviceIndex) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    peak_ = live_;
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t total = capacity ? capacity.load() : size_t{1} << 40;
    return {total - live_, total};
  }
  bool initialized() override {
    return true;
  }
  void emptyCache(c10::MempoolId_t) override {}
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;  // data and context differ
  }
  void copy_data(void* target, const void* source, size_t nbytes) const override {
    default_copy_data(target, source, nbytes);
  }

 private:
  std::mutex mutex_;
  size_t live_ = 0;
  size_t peak_ = 0;
  std::unordered_map<size_t, std::vector<void*>> free_;
};

Memory& memory = *new Memory();

void release(void* block) {
  memory.give_back(static_cast<Block*>(block));
}

std::mutex pinned_mutex;
auto& pinned = *new std::map<const char*, size_t>();

void unpin(void* data) {
  {
    const std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.erase(static_cast<char*>(data));
  }
  std::free(data);
}

struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = std::malloc(std::max<size_t>(size, 1));
    const std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned[static_cast<char*>(data)] = size;
    return {data, data, &unpin, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &unpin;
  }
  void copy_data(void* target, const void* source, size_t nbytes) const override {
    default_copy_data(target, source, nbytes);
  }
};

bool is_pinned(const void* data) {
  const std::lock_guard<std::mutex> lock(pinned_mutex);
  auto found = pinned.upper_bound(static_cast<const char*>(data));
  return found != pinned.begin() && static_cast<const char*>(data) < (--found)->first + std::max<size_t>(found->second, 1);
}

}  // namespace
