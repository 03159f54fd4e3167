// What the emulated kernels need of a CUDA torch, and what densreg/ops/extension.py asks of a library that counts calls.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "../../csrc/calls.h"
#include "cuda_runtime.h"

// Found before torch's own: the library is linked with -Bsymbolic.
extern "C" {
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
// Fresh memory is full of NaN, which an element that no kernel writes stays.
AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device, AtenTensorHandle* tensor) {
  static const auto torchs =
      reinterpret_cast<decltype(&aoti_torch_empty_strided)>(dlsym(RTLD_NEXT, "aoti_torch_empty_strided"));
  const AOTITorchError error = torchs(dims, sizes, strides, dtype, device_type, device, tensor);
  void* memory = nullptr;
  int64_t bytes = 0;
  if (error || aoti_torch_get_data_ptr(*tensor, &memory) || aoti_torch_get_storage_size(*tensor, &bytes)) return error;
  if (bytes) std::memset(memory, 0xff, static_cast<size_t>(bytes));
  return error;
}

__attribute__((visibility("default"))) const char* densreg_counter(int index, int64_t* calls) {
  return densreg::CallCounter::read(index, calls);
}

#define DENSREG_OPTION __attribute__((visibility("default")))
DENSREG_OPTION void densreg_reverse(int reverse) { emulation::options.reverse = reverse; }
DENSREG_OPTION void densreg_side_by_side(int blocks) { emulation::options.side_by_side = blocks; }
DENSREG_OPTION void densreg_tickets(int tickets) { emulation::options.tickets = tickets; }
DENSREG_OPTION void densreg_lead(int64_t lead) { emulation::options.lead = lead; }
DENSREG_OPTION int64_t densreg_waits() { return emulation::launch.waits; }
}
