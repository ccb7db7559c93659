// Structs of arrays and numbers as keyword arguments, and as dicts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "arrays.h"

namespace archer_fast {

// A struct of arrays is bound by a table of its fields' names. From Python it comes as keyword arguments, and
// goes as a dict.
template <class Struct, class Member>
struct Field {
  const char* name;
  Member Struct::* member;
};

template <class Struct, class Member>
constexpr Field<Struct, Member> field(const char* name, Member Struct::* member) {
  return {name, member};
}

// Booleans are bytes of 0 or 1: the core checks it.
template <class T>
using Element = std::conditional_t<std::is_same_v<T, std::uint8_t>, bool, T>;

// One field out of what came: a span reads it in place, a vector copies it, a number is taken.
template <class T>
void take(const char* name, const py::handle& value, std::span<const T>& to) {
  const std::span from = read(name, exact_array<Element<T>>(name, value));
  to = {reinterpret_cast<const T*>(from.data()), from.size()};
}

template <class T>
void take(const char* name, const py::handle& value, std::vector<T>& to) {
  std::span<const T> from;
  take(name, value, from);
  to.assign(from.begin(), from.end());
}

template <class T>
  requires std::is_arithmetic_v<T>
void take(const char* name, const py::handle& value, T& to) {
  try {
    to = py::cast<T>(value);
  } catch (const py::cast_error&) {
    throw py::type_error(concat(name, ": wanted a number in the range of its type, got ", std::string(py::str(value))));
  }
}

inline void take(const char* name, const py::handle& value, std::string& to) {
  if (!py::isinstance<py::str>(value)) {
    throw py::type_error(concat(name, ": wanted a str, got ", Py_TYPE(value.ptr())->tp_name));
  }
  to = py::cast<std::string>(value);
}

// The struct's fields, all of which must be there.
template <class Struct, class... Members>
void take_all(const py::kwargs& values, const std::tuple<Field<Struct, Members>...>& fields, Struct& to) {
  const auto take_one = [&](const auto& field) {
    if (!values.contains(field.name)) throw py::type_error(concat(field.name, ": wanted as a keyword, got nothing"));
    take(field.name, values[field.name], to.*field.member);
  };
  std::apply([&](const auto&... field) { (take_one(field), ...); }, fields);
}

// Throws where a keyword argument is no field of any of the tables.
template <class... Tables>
void refuse_others(const py::kwargs& values, const Tables&... tables) {
  for (const auto& [key, value] : values) {
    const std::string name = py::str(key);
    const auto is_in = [&](const auto& table) {
      return std::apply([&](const auto&... field) { return ((name == field.name) || ...); }, table);
    };
    if (!(is_in(tables) || ...)) throw py::type_error(concat(name, ": wanted none of this name"));
  }
}

template <class T>
py::object give(std::vector<T>&& values) {
  return to_array<Element<T>>(std::move(values));
}

template <class T>
  requires std::is_arithmetic_v<T>
py::object give(T value) {
  return py::cast(value);
}

template <class Struct, class... Members>
void give_all(Struct&& from, const std::tuple<Field<Struct, Members>...>& fields, py::dict& to) {
  std::apply([&](const auto&... field) { ((to[field.name] = give(std::move(from.*field.member))), ...); }, fields);
}

}  // namespace archer_fast
