// The Python module: it registers the launch functions, and says how their arguments cross.
//
// An array is None, or a tuple (address, code of the element type); a device is (index, stream). An error of
// CUDA is a RuntimeError that names the kernel.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "launches.h"

namespace py = pybind11;

namespace pybind11::detail {

/// (int, int) -> the two members of a struct; None -> as it is by default, if it may be.
template <typename Struct, typename First, typename Second>
bool from_pair(handle source, First Struct::* first, Second Struct::* second, Struct& value) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 2) return false;
    const size_t one = PyLong_AsSize_t(PyTuple_GET_ITEM(source.ptr(), 0));
    const size_t other = PyLong_AsSize_t(PyTuple_GET_ITEM(source.ptr(), 1));
    if (PyErr_Occurred()) {
        PyErr_Clear();
        return false;
    }
    value.*first = (First)one;
    value.*second = (Second)other;
    return true;
}

template <>
struct type_caster<fused_align::Array> {
    PYBIND11_TYPE_CASTER(fused_align::Array, const_name("tuple[int, int] | None"));
    bool load(handle source, bool) {
        using fused_align::Array;
        return source.is_none() || from_pair(source, &Array::data, &Array::type, value);
    }
};

template <>
struct type_caster<fused_align::Device> {
    PYBIND11_TYPE_CASTER(fused_align::Device, const_name("tuple[int, int]"));
    bool load(handle source, bool) {
        using fused_align::Device;
        return from_pair(source, &Device::index, &Device::stream, value);
    }
};

template <>
struct type_caster<fused_align::Type> {
    PYBIND11_TYPE_CASTER(fused_align::Type, const_name("int | None"));
    bool load(handle source, bool) {
        value = fused_align::Type::none;
        if (PyLong_Check(source.ptr())) value = static_cast<fused_align::Type>(PyLong_AsLong(source.ptr()));
        return source.is_none() || PyLong_Check(source.ptr());
    }
};

}  // namespace pybind11::detail

PYBIND11_MODULE(_cuda, m) {
    using namespace fused_align;
    using Unlocked =
        py::call_guard<py::gil_scoped_release>;  // a launch may wait, for a full queue or a compiler
    m.attr("device") = FUSED_ALIGN_DEVICE;       // of the tensors that it takes
    m.attr("interface") = INTERFACE;
    m.attr("archs") = FUSED_ALIGN_ARCHS;  // that it was compiled for
    m.def("unserved", unserved);
    m.def("exp_tile", exp_tile, Unlocked());
    m.def("grad_tile", grad_tile, Unlocked());
    m.def("kept_tile", kept_tile, Unlocked());
    m.def("add_products", add_products, Unlocked());
    m.def("open_rows", open_rows, Unlocked());
    m.def("finish_rows", finish_rows, Unlocked());
    m.def("coefficients", coefficients, Unlocked());
    m.def("compact", compact, Unlocked());
    m.def("scaled_rows", scaled_rows, Unlocked());
    m.def("close_product", close_product, Unlocked());
    m.def("store_hidden", store_hidden, Unlocked());
    m.def("add_rows", add_rows, Unlocked());
    m.def("logit_stats", logit_stats, Unlocked(), py::arg("on"), py::arg("logits"), py::arg("target"),
          py::arg("inverse"), py::arg("logp"), py::arg("lse"), py::arg("entropy"), py::arg("largest"),
          py::arg("total"), py::arg("partial"), py::arg("arrived"), py::arg("scalar"), py::arg("rows"),
          py::arg("vocab"), py::arg("stride"), py::arg("parts"));
    m.def("logit_gradient", logit_gradient, Unlocked(), py::arg("on"), py::arg("dlogp"), py::arg("dlse"),
          py::arg("dentropy"), py::arg("logits"), py::arg("target"), py::arg("logp"), py::arg("entropy"),
          py::arg("largest"), py::arg("total"), py::arg("inverse"), py::arg("out"), py::arg("scalar"),
          py::arg("rows"), py::arg("vocab"), py::arg("stride"), py::arg("out_stride"), py::arg("parts"));
    m.def("policy_loss", policy_loss, Unlocked(), py::arg("on"), py::arg("logp"), py::arg("old"),
          py::arg("ref"), py::arg("sampler"), py::arg("advantage"), py::arg("token_weight"),
          py::arg("target"), py::arg("offsets"), py::arg("lengths"), py::arg("params"), py::arg("divisor"),
          py::arg("c"), py::arg("partials"), py::arg("counter"), py::arg("sums"), py::arg("width"),
          py::arg("programs"), py::arg("KIND"), py::arg("RATIO"), py::arg("KL"), py::arg("PENALISED"),
          py::arg("CORRECTED"), py::arg("SAMPLER"), py::arg("WHOLE"), py::arg("COUPLED"),
          py::arg("PER_LENGTH"), py::arg("PER_TOKEN"), py::arg("HUMANLINE"), py::arg("METRICS"), py::arg("K"),
          py::arg("pieces") = 1);
    m.def("preference_loss", preference_loss, Unlocked(), py::arg("on"), py::arg("logp"), py::arg("ref"),
          py::arg("token_weight"), py::arg("margin"), py::arg("target"), py::arg("offsets"),
          py::arg("params"), py::arg("divisor"), py::arg("c"), py::arg("partials"), py::arg("counter"),
          py::arg("sums"), py::arg("width"), py::arg("programs"), py::arg("KIND"), py::arg("SCORE"),
          py::arg("MEAN"), py::arg("HUMANLINE"), py::arg("METRICS"), py::arg("K"));
    m.def("judged_loss", judged_loss, Unlocked(), py::arg("on"), py::arg("logp"), py::arg("ref"),
          py::arg("token_weight"), py::arg("desirable"), py::arg("kl"), py::arg("target"), py::arg("offsets"),
          py::arg("params"), py::arg("divisor"), py::arg("c"), py::arg("partials"), py::arg("counter"),
          py::arg("sums"), py::arg("width"), py::arg("programs"), py::arg("HUMANLINE"), py::arg("METRICS"),
          py::arg("K"));
}
