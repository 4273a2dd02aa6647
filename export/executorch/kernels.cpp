// Registers a whole token of the library in lowering/aot as an ExecuTorch kernel. Its name, RAMNET_OPERATOR, is of one
// model, so that a process can hold the kernels of several.
#define ET_USE_THREADPOOL
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <vector>

#include "ramnet.h"

namespace {

using executorch::aten::ArrayRef;
using executorch::aten::Tensor;
using executorch::runtime::KernelRuntimeContext;

// What a thread keeps from call to call: a model without weights of its own, and scratch memory.
struct Held {
  ramnet_model* model = nullptr;
  ramnet_state* state = nullptr;
  std::vector<const void*> weights;
  std::vector<float*> tensors;

  ~Held() {
    ramnet_state_free(state);
    ramnet_close(model);
  }

  bool ready() {
    weights.resize(ramnet_weight_count());
    if (model == nullptr && ramnet_wrap(weights.data(), 1, &model)) return false;
    return state != nullptr || ramnet_state_borrow(model, 1, &state) == RAMNET_OK;
  }
};

void on_threadpool(void*, int tasks, void (*task)(void*, int), void* context) {
  executorch::extension::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) task(context, static_cast<int>(i));
  });
}

Tensor& token_out(KernelRuntimeContext& context, const Tensor& ids, ArrayRef<Tensor> weights, ArrayRef<Tensor> state,
                  const Tensor& position, Tensor& out) {
  thread_local Held held;
  const int64_t id = *ids.const_data_ptr<int64_t>();
  const int vocabulary = ramnet_vocabulary();
  ET_KERNEL_CHECK_MSG(context, id >= 0 && id < vocabulary, InvalidArgument, out, "the id must be in 0..%d",
                      vocabulary - 1);
  ET_KERNEL_CHECK_MSG(context, held.ready(), MemoryAllocationFailed, out, "%s", ramnet_message());
  ET_KERNEL_CHECK(context, weights.size() == held.weights.size(), InvalidArgument, out);
  for (size_t i = 0; i < weights.size(); i++)
    held.weights[i] = weights[i].numel() > 0 ? weights[i].const_data_ptr() : nullptr;
  held.tensors.clear();
  for (const Tensor& tensor : state) held.tensors.push_back(tensor.mutable_data_ptr<float>());
  int64_t* const at = position.mutable_data_ptr<int64_t>();

  ramnet_rebind(held.model, held.weights.data());
  ramnet_use_runtime(held.model, on_threadpool, nullptr, static_cast<int>(executorch::extension::get_thread_count()));
  ramnet_state_bind(&held.state, 1, held.tensors.data(), at);
  const int status = ramnet_token(held.model, held.state, static_cast<int32_t>(id), out.mutable_data_ptr<float>());
  ET_KERNEL_CHECK_MSG(context, status == RAMNET_OK, Internal, out, "%s", ramnet_message());
  ++*at;
  return out;
}

EXECUTORCH_LIBRARY(ramnet, RAMNET_OPERATOR, token_out);

}  // namespace
