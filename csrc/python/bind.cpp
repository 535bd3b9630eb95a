// Python's entry. ktlib/operator/moe_experts.py owns every check of type, device, shape and layout, and keeps the tensors alive for the
// duration of the call, in which streaming.py and weight_stream.py call too; what arrives here are addresses. Expert ids
// are checked in C++ (layer/routing.cpp).
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <tuple>

#include "system/cpu.h"
#include "layer/dropout.h"
#include "layer/moe.h"
#include "system/threads.h"
#include "system/probe.h"

namespace nb = nanobind;
using namespace ktlib;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using MatrixArgs = std::tuple<uintptr_t, bool>;                            // address (0: absent), fp32
using LoraArgs = std::tuple<uintptr_t, uintptr_t, bool, int, float>;       // A, B, fp32, rank (0: absent), scaling
using SizeArgs = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;  // tokens, hidden, inter, experts, topk
using GateArgs = std::tuple<int, float, float>;                            // activation, limit, alpha
using DropoutArgs = std::tuple<int64_t, uint32_t>;                         // seed, threshold
using InputArgs = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, MatrixArgs, MatrixArgs, LoraArgs,
                             LoraArgs, GateArgs, bool, bool, int, DropoutArgs,
                             uintptr_t>;  // ... biases, LoRA, gate, transposed, interleaved, parts, dropout, elsewhere

Matrix matrix(const MatrixArgs& args) { return {at<void>(std::get<0>(args)), std::get<1>(args)}; }

Lora lora(const LoraArgs& args) {
  const auto& [a, b, fp32, rank, scaling] = args;
  return {{at<void>(a), fp32}, {at<void>(b), fp32}, rank, scaling};
}

Shape shape(const SizeArgs& args) {
  const auto& [tokens, hidden, inter, experts, topk] = args;
  return {tokens, hidden, inter, experts, topk};
}

Gate gate(const GateArgs& args) {
  const auto& [kind, limit, alpha] = args;
  return {Activation(kind), limit, alpha};
}

Dropout dropout(const DropoutArgs& args) { return {uint64_t(std::get<0>(args)), std::get<1>(args)}; }

Inputs inputs(const InputArgs& args) {
  const auto& [hidden_states, index, weights, gate_up, down, gate_up_bias, down_bias, gate_up_lora, down_lora, kind,
               transposed, interleaved, parts, drop, elsewhere] = args;
  return {at<const bf16>(hidden_states), at<const int64_t>(index), at<const float>(weights), at<const bf16>(gate_up),
          at<const bf16>(down), matrix(gate_up_bias), matrix(down_bias), lora(gate_up_lora), lora(down_lora),
          gate(kind), transposed, interleaved, parts, dropout(drop), at<const bool>(elsewhere)};
}

using SavedArgs = std::tuple<uintptr_t, uintptr_t, uintptr_t>;
Saved saved(const SavedArgs& args) {
  return {at<bf16>(std::get<0>(args)), at<bf16>(std::get<1>(args)), at<bf16>(std::get<2>(args))};
}

// Runs the handlers of signals that have arrived; whether one raised an exception.
bool signal_raised() {
  const nb::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

// work(kernels) without the GIL. On Python's main thread, where it has signal handlers run, one that raises (Ctrl-C)
// ends the call with its exception.
template <class Work>
void interruptible(const std::string& isa, const Work& work) {
  Kernels k = select_isa(isa);
  Interruption interruption(signal_raised);
  if (getpid() == syscall(SYS_gettid)) k.interruption = &interruption;
  bool raised = false;
  {
    const nb::gil_scoped_release release;
    try {
      work(k);
    } catch (const Interrupted&) {
      raised = true;
    }
  }
  if (raised) throw nb::python_error();
}

}  // namespace

NB_MODULE(_kernels, m) {
  m.def("isas", [] {
    std::vector<std::tuple<std::string, std::string>> list;
    for (const Isa& isa : isas()) list.emplace_back(isa.name, isa.missing);
    return list;
  });
  m.def("select_isa", [](const std::string& name) { return std::string(select_isa(name).isa); });
  m.def("forward", [](const std::string& isa, int threads, const SizeArgs& sizes, const InputArgs& in,
                      const MatrixArgs& output, const SavedArgs& save, bool whole) {
    interruptible(isa, [&](const Kernels& k) {
      forward(k, threads, shape(sizes), inputs(in), matrix(output), saved(save), whole);
    });
  });
  m.def("backward", [](const std::string& isa, int threads, const SizeArgs& sizes, const InputArgs& in,
                       const SavedArgs& save, uintptr_t grad_output, const MatrixArgs& grad_hidden_states,
                       uintptr_t grad_top_k_weights, const std::tuple<MatrixArgs, MatrixArgs>& gate_up_lora,
                       const std::tuple<MatrixArgs, MatrixArgs>& down_lora,
                       const std::tuple<uintptr_t, uintptr_t>& weights,
                       const std::tuple<MatrixArgs, MatrixArgs>& biases, bool whole) {
    Grads grads;
    grads.hidden_states = matrix(grad_hidden_states);
    grads.top_k_weights = at<float>(grad_top_k_weights);
    grads.gate_up_A = matrix(std::get<0>(gate_up_lora));
    grads.gate_up_B = matrix(std::get<1>(gate_up_lora));
    grads.down_A = matrix(std::get<0>(down_lora));
    grads.down_B = matrix(std::get<1>(down_lora));
    grads.gate_up_proj = at<bf16>(std::get<0>(weights));
    grads.down_proj = at<bf16>(std::get<1>(weights));
    grads.gate_up_bias = matrix(std::get<0>(biases));
    grads.down_bias = matrix(std::get<1>(biases));
    interruptible(isa, [&](const Kernels& k) {
      backward(k, threads, shape(sizes), inputs(in), saved(save), at<const bf16>(grad_output), grads, whole);
    });
  });
  m.def("place_pages", [](uintptr_t memory, int64_t bytes, int node) { place_pages(at<void>(memory), bytes, node); });
  m.def(
      "copy",
      [](int threads, const std::vector<std::vector<std::tuple<uintptr_t, uintptr_t, int64_t>>>& args, int64_t ahead,
         const std::optional<nb::callable>& ready) {
        std::vector<Piece> pieces;
        for (const auto& piece : args) {
          pieces.emplace_back();
          for (const auto& [to, from, bytes] : piece)
            pieces.back().push_back({at<void>(to), at<const void>(from), bytes});
        }
        const nb::gil_scoped_release release;
        copy(threads, pieces, ahead, [&](int64_t piece) {
          if (!ready) return;
          const nb::gil_scoped_acquire gil;
          (*ready)(piece);
        });
      },
      nb::arg(), nb::arg(), nb::arg("ahead") = 2, nb::arg("ready") = nb::none());
  m.def("keep_masks", [](const std::string& isa, int threads, uintptr_t masks, const DropoutArgs& drop,
                         uint32_t projection, uintptr_t slots, int64_t rows, int columns) {
    const Kernels& k = select_isa(isa);
    const nb::gil_scoped_release release;
    keep_masks(k, threads, at<bf16>(masks), dropout(drop), projection, at<const int64_t>(slots), rows, columns);
  });
  m.def("peak_rate", [](const std::string& isa, int threads) {
    const Kernels& k = select_isa(isa);
    nb::gil_scoped_release release;
    return peak_rate(k, threads, 5);
  });
  m.def("read_rate", [](int threads, int64_t bytes) {
    nb::gil_scoped_release release;
    return read_rate(threads, bytes, 5);
  });

  // The entries of one instruction set's table, for tests: addresses and sizes as in kernels/kernels.h.
  m.def("table", [](const std::string& isa) {
    const Kernels& k = select_isa(isa);
    return std::make_tuple(k.panel_width, k.row_unit, k.depth_unit);
  });
  m.def("pack_rows", [](const std::string& isa, uintptr_t panel, int width, uintptr_t src, int64_t ld, uintptr_t rows,
                        int count, int depth) {
    select_isa(isa).pack_rows(at<bf16>(panel), width, at<const bf16>(src), ld, at<const int32_t>(rows), count, depth);
  });
  m.def("pack_pairs", [](const std::string& isa, uintptr_t panel, int64_t panel_depth, int width, uintptr_t src,
                         int64_t ld, uintptr_t rows, int depth, int columns) {
    const Kernels& k = select_isa(isa);
    if (k.thread_begin) k.thread_begin();
    k.pack_pairs(at<bf16>(panel), panel_depth, width, at<const bf16>(src), ld, at<const int32_t>(rows), depth, columns);
    if (k.thread_end) k.thread_end();
  });
  m.def("multiply", [](const std::string& isa, uintptr_t c, int64_t ldc, uintptr_t a, int64_t lda, uintptr_t panel,
                       int width, int rows, int depth, bool accumulate) {
    const Kernels& k = select_isa(isa);
    if (k.thread_begin) k.thread_begin();
    k.multiply(at<float>(c), ldc, at<const bf16>(a), lda, at<const bf16>(panel), width, rows, depth, accumulate);
    if (k.thread_end) k.thread_end();
  });
  m.def("unpermute", [](const std::string& isa, uintptr_t c, int64_t ldc, int rows, int width) {
    select_isa(isa).unpermute(at<float>(c), ldc, rows, width);
  });
  m.def("activate", [](const std::string& isa, const GateArgs& kind, uintptr_t h, uintptr_t g, uintptr_t up, int step,
                       int64_t count) {
    select_isa(isa).activate(gate(kind), at<float>(h), at<const float>(g), at<const float>(up), step, count);
  });
  m.def("interleave", [](const std::string& isa, uintptr_t panel, int64_t panel_depth, int width, uintptr_t c,
                         int64_t ldc, int features) {
    select_isa(isa).interleave(at<bf16>(panel), panel_depth, width, at<const float>(c), ldc, features);
  });
  m.def("store_rows", [](const std::string& isa, uintptr_t dst, bool fp32, int64_t ld, uintptr_t c, int64_t ldc,
                         int features, int tokens) {
    const Kernels& k = select_isa(isa);
    if (fp32)
      k.store_rows_f32(at<float>(dst), ld, at<const float>(c), ldc, features, tokens);
    else
      k.store_rows_bf16(at<bf16>(dst), ld, at<const float>(c), ldc, features, tokens);
  });
  m.def("round", [](const std::string& isa, uintptr_t dst, uintptr_t src, float scale, int64_t count) {
    select_isa(isa).round(at<bf16>(dst), at<const float>(src), scale, count);
  });
  m.def("widen", [](const std::string& isa, uintptr_t dst, uintptr_t src, float scale, int64_t count) {
    select_isa(isa).widen(at<float>(dst), at<const bf16>(src), scale, count);
  });
  m.def("gate_backward", [](const std::string& isa, const GateArgs& kind, uintptr_t dh, uintptr_t g, uintptr_t up,
                            int step, float weight, uintptr_t dgate, uintptr_t dup, int features) {
    return select_isa(isa).gate_backward(gate(kind), at<float>(dh), at<const bf16>(g), at<const bf16>(up), step, weight,
                                         at<bf16>(dgate), at<bf16>(dup), features);
  });
  m.def("rank_grad", [](const std::string& isa, uintptr_t grad, int64_t ld, int rank, uintptr_t t, int64_t ldt,
                        uintptr_t src, bool fp32, int64_t lds, uintptr_t index, int rows, int columns) {
    const Kernels& k = select_isa(isa);
    if (fp32)
      k.rank_grad_f32(at<float>(grad), ld, rank, at<const bf16>(t), ldt, at<const float>(src), lds,
                      at<const int32_t>(index), rows, columns);
    else
      k.rank_grad_bf16(at<float>(grad), ld, rank, at<const bf16>(t), ldt, at<const bf16>(src), lds,
                       at<const int32_t>(index), rows, columns);
  });
  m.def("combine", [](const std::string& isa, uintptr_t out, bool fp32, const std::vector<uintptr_t>& rows,
                      uintptr_t weights, int64_t size) {
    std::vector<const float*> pointers;
    for (uintptr_t row : rows) pointers.push_back(at<const float>(row));
    select_isa(isa).combine(fp32 ? nullptr : at<bf16>(out), fp32 ? at<float>(out) : nullptr, pointers.data(),
                            at<const float>(weights), int(rows.size()), size);
  });
  m.def("keep_mask", [](const std::string& isa, uintptr_t mask, const DropoutArgs& drop, uint32_t projection,
                        int64_t slot, int first, int count) {
    select_isa(isa).keep_mask(at<bf16>(mask), dropout(drop), projection, slot, first, count);
  });
}
