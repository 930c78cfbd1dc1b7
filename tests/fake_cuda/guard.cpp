// A CUDA device for torch's fake tensors where no GPU is: one device, one stream, no memory, no work.
//
// Autograd and autocast ask for the guard of a tensor's device and for the accelerator, which a CPU build of torch has not got. Fake
// tensors need no more than that: their kernels compute shapes.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device only(c10::DeviceType::CUDA, 0);
const c10::Stream main_stream(c10::Stream::DEFAULT, only);

struct FakeGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const noexcept override { return c10::DeviceType::CUDA; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Device getDevice() const noexcept override { return only; }
  c10::Device exchangeDevice(c10::Device) const noexcept override { return only; }
  void setDevice(c10::Device) const noexcept override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}

  c10::Stream getStream(c10::Device) const noexcept override { return main_stream; }
  c10::Stream getDefaultStream(c10::Device) const noexcept override { return main_stream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return main_stream; }

  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const noexcept override {}
  void block(void*, const c10::Stream&) const noexcept override {}
  bool queryEvent(void*) const noexcept override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard)

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const { return true; }  // virtual in newer versions of torch only
  bool isAvailable() const { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
};

}  // namespace

namespace at {  // torch looks for this name
using ::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at
