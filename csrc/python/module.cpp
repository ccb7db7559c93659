// archer_fast._C: this folder is all of the core's neighbourhood that knows Python.
//
// Array arguments are bound with noconvert(): another dtype or stride is a TypeError, because pybind11 would otherwise
// hand over a silent copy and what is written there would vanish. The GIL is released around every call that may wait
// for the buffer's lock, and no callee takes it back.
// std::invalid_argument becomes ValueError, std::out_of_range IndexError, std::bad_alloc MemoryError, and
// std::system_error OSError.
#include "module.h"

#include <exception>
#include <system_error>

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C++ core of archer_fast.";
  py::register_local_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const std::system_error& error) {
      const py::tuple number_and_text = py::make_tuple(error.code().value(), error.what());
      PyErr_SetObject(PyExc_OSError, number_and_text.ptr());  // Python chooses the subclass by the number
    }
  });
  auto buffer = archer_fast::bind_trajectory_buffer(module);
  archer_fast::bind_batches(buffer);
  archer_fast::bind_features(buffer);
  archer_fast::bind_open_trajectory(module);
  archer_fast::bind_token_packer(module);
  archer_fast::bind_kernels(module);
}
