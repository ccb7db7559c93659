// NumPy arrays as the core's spans, and the core's vectors as NumPy arrays. Nothing is converted in silence: another
// dtype, rank or layout, misaligned or read-only memory throws.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "concat.h"

namespace archer_fast {

namespace py = pybind11;
using namespace py::literals;

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Ids = Array<std::int64_t>;

template <class T>
void check_layout(const char* name, const Array<T>& array) {
  if (array.ndim() != 1) throw std::invalid_argument(concat(name, ": wanted 1 dimension, got ", array.ndim()));
  if (reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) != 0) {
    throw std::invalid_argument(
        concat(name, ": wanted memory aligned to ", alignof(T), " bytes, got a misaligned array"));
  }
}

template <class T>
std::span<const T> read(const char* name, const Array<T>& array) {
  check_layout(name, array);
  return {array.data(), static_cast<std::size_t>(array.size())};
}

// The same, as they are now: what is checked without the GIL and used afterwards must not change in between.
template <class T>
std::vector<T> copied(const char* name, const Array<T>& array) {
  const std::span items = read(name, array);
  return {items.begin(), items.end()};
}

template <class T>
std::span<T> write(const char* name, Array<T>& array) {
  check_layout(name, array);
  if (!array.writeable()) throw std::invalid_argument(concat(name, ": wanted a writeable array, got a read-only one"));
  return {array.mutable_data(), static_cast<std::size_t>(array.size())};
}

template <class T>
Array<T> empty(std::int64_t size) {
  return Array<T>(static_cast<py::ssize_t>(size));
}

inline Ids empty_ids(std::int64_t n) {
  if (n < 0) throw std::invalid_argument(concat("n: wanted 0 or more, got ", n));
  return empty<std::int64_t>(n);
}

// Moves the vector into an array that owns it.
template <class T, class Stored>
Array<T> to_array(std::vector<Stored>&& values) {
  static_assert(sizeof(T) == sizeof(Stored));
  auto owned = std::make_unique<std::vector<Stored>>(std::move(values));
  const auto size = static_cast<py::ssize_t>(owned->size());
  const auto* const data = reinterpret_cast<const T*>(owned->data());
  const py::capsule owner(owned.get(), [](void* vector) { delete static_cast<std::vector<Stored>*>(vector); });
  owned.release();
  return Array<T>(size, data, owner);
}

template <class T>
Array<T> exact_array(const char* name, const py::handle& value) {
  if (!py::isinstance<py::array>(value)) {
    throw py::type_error(concat(name, ": wanted a NumPy array, got ", Py_TYPE(value.ptr())->tp_name));
  }
  if (!Array<T>::check_(value)) {
    const std::string dtype = py::str(py::dtype::of<T>()), got = py::str(value.attr("dtype"));
    const char* const layout = dtype == got ? " that is not contiguous" : "";
    throw py::type_error(concat(name, ": wanted a C-contiguous array of ", dtype, ", got one of ", got, layout));
  }
  return py::reinterpret_borrow<Array<T>>(value);
}

// What `memory` gives, a function of the number of bytes; arrays made over it keep it alive.
inline Array<std::uint8_t> ask_for(const py::function& memory, std::size_t num_bytes) {
  const py::object given = memory(num_bytes);
  Array<std::uint8_t> bytes = exact_array<std::uint8_t>("memory", given);
  const std::span room = write("memory", bytes);
  if (room.size() < num_bytes) {
    throw std::invalid_argument(concat("memory: wanted ", num_bytes, " bytes, got ", room.size()));
  }
  if (reinterpret_cast<std::uintptr_t>(room.data()) % alignof(std::max_align_t) != 0) {
    throw std::invalid_argument(
        concat("memory: wanted memory aligned to ", alignof(std::max_align_t), " bytes, got a misaligned array"));
  }
  return bytes;
}

// An argument that is an array: another kind is a TypeError and no copy.
inline py::arg array(const char* name) { return py::arg(name).noconvert(); }

}  // namespace archer_fast
