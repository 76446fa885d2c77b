// megatron_llm._native: C++ versions of loops that are slow in Python, each with a Python reference of the same result.
// Built by setup.py; without a compiler the references run instead.

#include <pybind11/pybind11.h>

void define_blending(pybind11::module_& module);
void define_packing(pybind11::module_& module);

PYBIND11_MODULE(_native, module) {
    module.doc() = "C++ versions of loops that are slow in Python.";
    define_blending(module);
    define_packing(module);
}
