// A simulated accelerator on torch's PrivateUse1 key: memory of its own with a capacity, streams that are threads, events, pinned memory.
//
// Operators run on the host at once, after the current stream has come to rest (views do not wait). Copies to and from pinned memory are jobs of a
// stream and take as long as the bandwidth says.

#include "simdev.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

namespace {

std::atomic<double> bytes_per_s{0};  // 0: copies take no added time
std::atomic<int64_t> async_copies{0};

// ---- what torch asks of a device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream(c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, kDevice, id);
  }
  static Point& point(void* event) {
    return *static_cast<Point*>(event);
  }
  c10::DeviceType type() const override { return kSim; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(new_queue()); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(new_queue()); }
  c10::Stream exchangeStream(c10::Stream next) const override { return stream(std::exchange(current_stream, next.id())); }
  bool queryStream(const c10::Stream& s) const override { return queue(s.id()).idle(); }
  void synchronizeStream(const c10::Stream& s) const override { queue(s.id()).drain(); }
  void synchronizeDevice(c10::DeviceIndex) const override { drain_all(); }
  void recordDataPtrOnStream(const c10::DataPtr& ptr, const c10::Stream& s) const override { memory.recordStream(ptr, s); }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<Point*>(event); }
  void record(void** event, const c10::Stream& s, c10::DeviceIndex, c10::EventFlag) const override {
    if (*event == nullptr) {
      *event = new Point();
    }
    point(*event) = mark(s.id());
  }
  void block(void* event, const c10::Stream& s) const override {
    if (event != nullptr) {
      queue(s.id()).push([p = point(event)] { p.wait(); });
    }
  }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) {
      point(event).wait();
    }
  }
  bool queryEvent(void* event) const override {
    return event == nullptr || point(event).wait_for(std::chrono::seconds(0)) == std::future_status::ready;
  }
  double elapsedTime(void* from, void* to, c10::DeviceIndex) const override {
    return std::chrono::duration<double, std::milli>(point(to).get() - point(from).get()).count();
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Device getDeviceFromPtr(void*) const override { return kDevice; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static auto* allocator = new Pinned();
    return allocator;
  }
};

// ---- tensors

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(sizes, strides, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), at::dtype_or_default(dtype));
}

at::Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), at::dtype_or_default(dtype), format);
}

bool on_device(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kSim;
}

// A tensor of another backend over the same bytes, which it does not own.
at::Tensor host_view(const at::Tensor& tensor) {
  if (!on_device(tensor)) {
    return tensor;
  }
  const auto& storage = tensor.storage();
  c10::Storage host(c10::Storage::use_byte_size_t(), storage.nbytes(), c10::DataPtr(storage.mutable_data(), c10::Device(c10::DeviceType::CPU)), c10::GetAllocator(c10::DeviceType::CPU), true);
  auto view = at::detail::make_tensor<c10::TensorImpl>(std::move(host), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return view;
}

// A device tensor with a storage of its own that holds the bytes of a host one.
at::Tensor to_device(const at::Tensor& host) {
  auto tensor = empty_strided(host.sizes(), host.strides(), host.scalar_type(), {}, {}, {});
  queue(current_stream).drain();
  if (host.numel() > 0) {
    std::memcpy(tensor.mutable_data_ptr(), host.const_data_ptr(), tensor.storage().nbytes());
  }
  return tensor;
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  if (target.numel() == 0) {
    return target;
  }
  const bool inside = on_device(source) && on_device(target);
  const auto nbytes = static_cast<double>(target.numel() * target.element_size());
  const double seconds = inside || bytes_per_s == 0 ? 0 : nbytes / bytes_per_s;
  queue(current_stream).push([from = host_view(source), to = host_view(target), seconds]() mutable {
    const at::NoGradGuard no_grad;
    const at::AutoDispatchBelowADInplaceOrView below;
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
    to.copy_(from);
  });
  const void* host = (on_device(source) ? target : source).const_data_ptr();
  if (inside || (non_blocking && is_pinned(host))) {
    async_copies += !inside;
  } else {
    queue(current_stream).drain();
  }
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

void record_stream(at::Tensor& tensor, c10::Stream stream) {
  memory.recordStream(tensor.storage().data_ptr(), stream);
}

// 0 is the composite of plain operators; there are no fused kernels.
int64_t choose_attention(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;
}

// Runs one operator on host views of its device arguments.
class HostCall {
 public:
  HostCall(const c10::OperatorHandle& op, torch::jit::Stack& stack) : op_(op), stack_(stack) {}

  void run() {
    const auto& schema = op_.schema();
    if (!is_view(schema)) {  // a view touches no bytes; if it waited, it would hide that something else does not
      queue(current_stream).drain();
    }
    for (auto& value : torch::jit::last(stack_, schema.arguments().size()).vec()) {
      arguments_.push_back(to_host(value));
    }
    torch::jit::drop(stack_, schema.arguments().size());
    stack_.insert(stack_.end(), arguments_.begin(), arguments_.end());
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack_);
    for (const auto& [device, host] : views_) {
      adopt(device, host);
    }
    const size_t first = stack_.size() - schema.returns().size();
    for (size_t i = 0; i < schema.returns().size(); ++i) {
      stack_[first + i] = to_sim(stack_[first + i], schema.returns()[i].alias_info() != nullptr);
    }
  }

 private:
  static bool is_view(const c10::FunctionSchema& schema) {
    const auto& returns = schema.returns();
    return !returns.empty() && std::all_of(returns.begin(), returns.end(), [](const c10::Argument& value) {
      return value.alias_info() != nullptr && !value.alias_info()->isWrite();
    });
  }
  at::Tensor view(const at::Tensor& tensor) {
    if (on_device(tensor)) {
      views_.emplace_back(tensor, host_view(tensor));
      return views_.back().second;
    }
    return tensor;
  }
  c10::IValue to_host(const c10::IValue& value) {
    if (value.isTensor()) {
      return view(value.toTensor());
    }
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) {
        list.push_back(view(tensor));
      }
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& tensor : value.toOptionalTensorVector()) {
        list.push_back(tensor ? std::optional(view(*tensor)) : std::nullopt);
      }
      return list;
    }
    return value.isDevice() ? c10::IValue(c10::Device(c10::DeviceType::CPU)) : value;
  }
  // An out argument that the operator has resized has its bytes on the host now.
  static void adopt(const at::Tensor& device, const at::Tensor& host) {
    if (host.storage().data() != device.storage().data()) {
      auto data = memory.allocate(host.storage().nbytes());
      queue(current_stream).drain();
      std::memcpy(data.get(), host.storage().data(), host.storage().nbytes());
      device.storage().unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
      device.storage().unsafeGetStorageImpl()->set_nbytes(host.storage().nbytes());
      host.storage().unsafeGetStorageImpl()->set_data_ptr_noswap({device.storage().mutable_data(), c10::Device(c10::DeviceType::CPU)});
    }
    device.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  }
  at::Tensor to_sim(const at::Tensor& result, bool aliased) {
    for (const auto& [device, host] : views_) {
      if (host.is_same(result)) {
        return device;
      }
    }
    for (const auto& [device, host] : views_) {
      if (result.defined() && aliased && result.storage().data() == host.storage().data()) {
        auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(device.storage()), device.key_set(), result.dtype());
        view.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides(), result.storage_offset());
        return view;
      }
    }
    return result.defined() ? to_device(result) : result;
  }
  c10::IValue to_sim(const c10::IValue& value, bool aliased) {
    if (value.isTensor()) {
      return to_sim(value.toTensor(), aliased);
    }
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) {
        list.push_back(to_sim(tensor, aliased));
      }
      return list;
    }
    return value;
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack& stack_;
  std::vector<c10::IValue> arguments_;
  std::vector<std::pair<at::Tensor, at::Tensor>> views_;
};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  HostCall(op, *stack).run();
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("record_stream", &record_stream);
  library.impl("_fused_sdp_choice", &choose_attention);
}

}  // namespace

extern "C" {

void sim_register() {
  c10::SetAllocator(kSim, &memory);
  c10::impl::registerDeviceGuard(kSim, new Guard());
  at::RegisterPrivateUse1HooksInterface(new Hooks());
}

// Bytes of memory (0: no limit), bytes that every block is rounded up to a multiple of, and speed of the link (0: no delay).
void sim_configure(int64_t capacity, int64_t granularity, double link_bytes_per_s) {
  memory.capacity = capacity;
  memory.granularity = granularity;
  bytes_per_s = link_bytes_per_s;
}

int64_t sim_async_copies() {
  return async_copies;
}
}
