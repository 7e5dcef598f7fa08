// Numbers in settings: the whole text or nothing.
#pragma once

#include <charconv>
#include <string>

namespace softnpu {

// False when the text is anything but one number that fits.
template <class Number>
bool number(const std::string& text, Number* value) {
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, *value);
  return error == std::errc() && stop == end;
}

}  // namespace softnpu
