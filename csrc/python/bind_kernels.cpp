// Python's entry to the tables of kernels, which tests compare with their definition.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "python/bind.h"
#include "system/cpu.h"
#include "system/threads.h"
#include "weights/weight.h"

namespace nb = nanobind;

namespace ktlib {

void bind_kernels(nb::module_& m) {
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
    k.multiply(at<float>(c), ldc, at<const bf16>(a), lda, at<const bf16>(panel), depth, width, rows, depth, accumulate);
    if (k.thread_end) k.thread_end();
  });
  m.def("unpermute", [](const std::string& isa, uintptr_t c, int64_t ldc, int rows, int width) {
    select_isa(isa).unpermute(at<float>(c), ldc, rows, width);
  });
  m.def("activate", [](const std::string& isa, const Gate& gate, uintptr_t h, uintptr_t g, uintptr_t up, int step,
                       int64_t count) {
    select_isa(isa).activate(gate, at<float>(h), at<const float>(g), at<const float>(up), step, count);
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
  m.def("gate_backward", [](const std::string& isa, const Gate& gate, uintptr_t dh, uintptr_t g, uintptr_t up,
                            int step, float weight, uintptr_t dgate, uintptr_t dup, int features) {
    return select_isa(isa).gate_backward(gate, at<float>(dh), at<const bf16>(g), at<const bf16>(up), step, weight,
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
  m.def("decode_rows", [](const std::string& isa, uintptr_t dst, int64_t ldd, const Weight& weight, int64_t expert,
                          int64_t row, int rows, int64_t first, int64_t count) {
    const DefaultFloats floats;
    weight.write(select_isa(isa), expert, row, rows, first, count, at<bf16>(dst), ldd);
  });
  m.def("keep_mask", [](const std::string& isa, uintptr_t mask, const Dropout& dropout, uint32_t projection,
                        int64_t slot, int first, int count) {
    select_isa(isa).keep_mask(at<bf16>(mask), dropout, projection, slot, first, count);
  });
}

}  // namespace ktlib
