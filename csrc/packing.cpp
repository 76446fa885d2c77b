// Best-fit-decreasing bin packing for megatron_llm/data/packing.py, which holds the Python reference with the same result.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <set>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

using Lengths = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// Bin of each item. `lengths` is sorted from long to short, every length in [1, capacity]. An item goes to the bin with the
// least room that still takes it, among equals to the one that reached this room last; else it opens the next bin.
//
// Items of equal length are placed bin by bin: if the least room that takes a length is r, no bin has a room from the length
// to r - 1, so the bin that gets one item has the least room for the next as well, until it takes no more.
static py::array_t<int64_t> best_fit_decreasing(const Lengths& lengths, int64_t capacity) {
    const int64_t count = lengths.size();
    const int64_t* length = lengths.data();
    if (capacity < 1) throw std::invalid_argument("best_fit_decreasing: capacity must be positive");
    for (int64_t i = 0; i < count; ++i)
        if (length[i] < 1 || length[i] > capacity || (i > 0 && length[i] > length[i - 1]))
            throw std::invalid_argument("best_fit_decreasing: lengths must fall and lie in [1, capacity]");

    py::array_t<int64_t> result(count);
    int64_t* bin_of = result.mutable_data();
    {
        py::gil_scoped_release release;
        std::vector<std::vector<int64_t>> stacks(capacity);  // bins by their room; full bins are in none
        std::set<int64_t> rooms;                             // rooms whose stack is not empty
        int64_t bins = 0;
        for (int64_t i = 0; i < count;) {
            const int64_t size = length[i];
            int64_t end = i + 1;
            while (end < count && length[end] == size) ++end;
            for (auto best = rooms.lower_bound(size); i < end;) {
                int64_t bin, room;
                if (best == rooms.end()) {
                    bin = bins++;
                    room = capacity;
                } else {
                    room = *best;
                    bin = stacks[room].back();
                    stacks[room].pop_back();
                    if (stacks[room].empty()) best = rooms.erase(best);
                }
                const int64_t taken = std::min(end - i, room / size);
                std::fill_n(bin_of + i, taken, bin);
                i += taken;
                room -= taken * size;
                if (room > 0) {
                    if (stacks[room].empty()) rooms.insert(room);
                    stacks[room].push_back(bin);
                }
            }
        }
    }
    return result;
}

void define_packing(py::module_& module) {
    module.def("best_fit_decreasing", &best_fit_decreasing, py::arg("lengths"), py::arg("capacity"));
}
