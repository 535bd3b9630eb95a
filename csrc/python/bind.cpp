// Python's entry. ktlib/operator/moe_experts.py checks type, device, shape and layout of every tensor, and registered_op.py holds the tensors
// alive while the call lasts; the files of ktlib/operator/gpu do so for theirs. What arrives here are addresses. Expert ids
// are checked in C++ (layer/routing.cpp).
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <tuple>
#include <type_traits>

#include "layer/dropout.h"
#include "layer/moe.h"
#include "python/bind.h"
#include "system/copy.h"
#include "system/cpu.h"
#include "system/pages.h"
#include "system/probe.h"
#include "system/threads.h"

namespace nb = nanobind;
using namespace ktlib;

namespace {

// How a field of a struct comes from Python: a pointer as an address (0: null), an enum as its number.
template <class T>
struct Argument {
  using type = T;
};
template <class T>
struct Argument<T*> {
  using type = uintptr_t;
};
template <class T>
  requires std::is_enum_v<T>
struct Argument<T> {
  using type = std::underlying_type_t<T>;
};

template <class Struct, class T>
struct Field {
  const char* name;
  T Struct::*member;
};
template <class Struct, class T>
Field(const char*, T Struct::*) -> Field<Struct, T>;

// The struct as a class of Python, whose constructor takes each of these fields by keyword, and none but all of them.
template <class Struct, class... T>
void bind_struct(nb::module_& m, const char* name, const Field<Struct, T>&... fields) {
  nb::class_<Struct> type(m, name);
  type.def(
      "__init__",
      [=](Struct* self, const typename Argument<T>::type&... values) {
        new (self) Struct();
        ((self->*fields.member = (T)values), ...);
      },
      nb::kw_only(), nb::arg(fields.name)...);
  (type.def_prop_ro(fields.name, [=](const Struct& self) { return (typename Argument<T>::type)(self.*fields.member); }),
   ...);
}

// Runs the handlers of signals that have arrived; whether one raised an exception.
bool signal_raised() {
  const nb::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

// work(call) without the GIL. On Python's main thread, where it has signal handlers run, one that raises (Ctrl-C) ends the
// call with its exception.
template <class Work>
void interruptible(const std::string& isa, int threads, const Work& work) {
  Interruption interruption(signal_raised);
  const bool main_thread = getpid() == syscall(SYS_gettid);
  const Call call = {select_isa(isa), threads, main_thread ? &interruption : nullptr};
  bool raised = false;
  {
    const nb::gil_scoped_release release;
    try {
      work(call);
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
  bind_struct(m, "Shape", Field{"tokens", &Shape::tokens}, Field{"hidden", &Shape::hidden},
              Field{"inter", &Shape::inter}, Field{"experts", &Shape::experts}, Field{"topk", &Shape::topk});
  bind_struct(m, "Matrix", Field{"data", &Matrix::data}, Field{"fp32", &Matrix::fp32});
  bind_struct(m, "Lora", Field{"A", &Lora::A}, Field{"B", &Lora::B}, Field{"rank", &Lora::rank},
              Field{"scaling", &Lora::scaling});
  bind_struct(m, "Gate", Field{"kind", &Gate::kind}, Field{"limit", &Gate::limit}, Field{"alpha", &Gate::alpha});
  bind_struct(m, "Dropout", Field{"seed", &Dropout::seed}, Field{"threshold", &Dropout::threshold});
  bind_struct(m, "Settings", Field{"gate", &Settings::gate}, Field{"dropout", &Settings::dropout},
              Field{"transposed", &Settings::transposed}, Field{"interleaved", &Settings::interleaved},
              Field{"numa_parts", &Settings::numa_parts}, Field{"whole", &Settings::whole});
  bind_struct(m, "Weight", Field{"format", &Weight::format}, Field{"tensors", &Weight::tensors},
              Field{"tensor_rows", &Weight::tensor_rows}, Field{"rows", &Weight::rows},
              Field{"columns", &Weight::columns}, Field{"scales", &Weight::scales}, Field{"zeros", &Weight::zeros},
              Field{"scale_type", &Weight::scale_type}, Field{"group_rows", &Weight::group_rows},
              Field{"group_columns", &Weight::group_columns});
  bind_struct(m, "Inputs", Field{"shape", &Inputs::shape}, Field{"settings", &Inputs::settings},
              Field{"hidden_states", &Inputs::hidden_states}, Field{"top_k_index", &Inputs::top_k_index},
              Field{"top_k_weights", &Inputs::top_k_weights}, Field{"gate_up_proj", &Inputs::gate_up_proj},
              Field{"down_proj", &Inputs::down_proj}, Field{"gate_up_bias", &Inputs::gate_up_bias},
              Field{"down_bias", &Inputs::down_bias}, Field{"gate_up_lora", &Inputs::gate_up_lora},
              Field{"down_lora", &Inputs::down_lora}, Field{"elsewhere", &Inputs::elsewhere});
  bind_struct(m, "Saved", Field{"gate_up", &Saved::gate_up}, Field{"t_gate_up", &Saved::t_gate_up},
              Field{"t_down", &Saved::t_down});
  bind_struct(m, "Grads", Field{"hidden_states", &Grads::hidden_states}, Field{"top_k_weights", &Grads::top_k_weights},
              Field{"gate_up_proj", &Grads::gate_up_proj}, Field{"down_proj", &Grads::down_proj},
              Field{"gate_up_bias", &Grads::gate_up_bias}, Field{"down_bias", &Grads::down_bias},
              Field{"gate_up_lora_A", &Grads::gate_up_A}, Field{"gate_up_lora_B", &Grads::gate_up_B},
              Field{"down_lora_A", &Grads::down_A}, Field{"down_lora_B", &Grads::down_B});
  m.def("forward", [](const std::string& isa, int threads, const Inputs& in, const Matrix& output, const Saved& saved) {
    interruptible(isa, threads, [&](const Call& call) { forward(call, in, output, saved); });
  });
  m.def("backward", [](const std::string& isa, int threads, const Inputs& in, const Saved& saved,
                       uintptr_t grad_output, const Grads& grads) {
    interruptible(isa, threads,
                  [&](const Call& call) { backward(call, in, saved, at<const bf16>(grad_output), grads); });
  });
  m.def("decode", [](const std::string& isa, int threads, uintptr_t dst, const Weight& weight, int64_t rows) {
    interruptible(isa, threads, [&](const Call& call) {
      parallel_tasks(call, rows, [&](int64_t row, int) {
        weight.write(call.kernels, 0, row, 1, 0, weight.columns, at<bf16>(dst) + row * weight.columns, weight.columns);
      });
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
  m.def("keep_masks", [](const std::string& isa, int threads, uintptr_t masks, const Dropout& dropout,
                         uint32_t projection, uintptr_t slots, int64_t rows, int columns) {
    const Call call = {select_isa(isa), threads};
    const nb::gil_scoped_release release;
    keep_masks(call, at<bf16>(masks), dropout, projection, at<const int64_t>(slots), rows, columns);
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
  bind_kernels(m);
}
