// The text of an error message: every argument printed one after the other.
#pragma once

#include <sstream>
#include <string>

namespace archer_fast {

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace archer_fast
