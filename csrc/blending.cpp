// Megatron's greedy order of a blend's sources. `megatron_llm/data/megatron_order.py` calls it and has the same
// algorithm in numpy, which is its specification. O(rows * sources).

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

using Weights = py::array_t<double, py::array::c_style | py::array::forcecast>;

// Source of each of `size` rows: the one with the largest weight * max(row, 1) - rows so far, the first of equals.
static py::array_t<int16_t> greedy_blend(const Weights& weights, int64_t size) {
    if (weights.ndim() != 1 || weights.size() < 1 || weights.size() > INT16_MAX || size < 0)
        throw std::invalid_argument("weights must be a 1-D array of 1 to 32767 entries, size not negative");
    const int64_t sources = weights.size();
    const double* weight = weights.data();
    py::array_t<int16_t> result(size);
    int16_t* source_of = result.mutable_data();
    {
        py::gil_scoped_release release;
        std::vector<double> counts(sources, 0.0);
        for (int64_t row = 0; row < size; ++row) {
            const double rows = static_cast<double>(std::max<int64_t>(row, 1));
            int64_t best = 0;
            double most = weight[0] * rows - counts[0];
            for (int64_t source = 1; source < sources; ++source) {
                const double behind = weight[source] * rows - counts[source];
                if (behind > most) {
                    most = behind;
                    best = source;
                }
            }
            source_of[row] = static_cast<int16_t>(best);
            counts[best] += 1.0;
        }
    }
    return result;
}

void define_blending(py::module_& module) {
    module.def("greedy_blend", &greedy_blend, py::arg("weights"), py::arg("size"));
}
