# Tests that are not gtest cases: checks of the tree, programs run from outside.

add_test(NAME Tree.IsTidy
  COMMAND Python3::Interpreter ${PROJECT_SOURCE_DIR}/tools/tidy.py ${PROJECT_SOURCE_DIR})
add_test(NAME Tree.TidyFindsEachViolation
  COMMAND Python3::Interpreter ${PROJECT_SOURCE_DIR}/tools/tidy_test.py)

# What a user of the library does: find_package on an installed one, and add_subdirectory.
add_test(NAME Packaging.AnInstalledLibraryIsFoundAndUsed
  COMMAND ${CMAKE_COMMAND} -DSOURCE=${PROJECT_SOURCE_DIR} -DBUILD=${PROJECT_BINARY_DIR}
    -DCOMPILER=${CMAKE_CXX_COMPILER} -DFLAGS=${CMAKE_CXX_FLAGS} -DGENERATOR=${CMAKE_GENERATOR}
    -P ${PROJECT_SOURCE_DIR}/tests/packaging/installed.cmake)
add_test(NAME Packaging.ASubdirectoryKeepsToItself
  COMMAND ${CMAKE_COMMAND} -DSOURCE=${PROJECT_SOURCE_DIR} -DBUILD=${PROJECT_BINARY_DIR}
    -DCOMPILER=${CMAKE_CXX_COMPILER} -DGENERATOR=${CMAKE_GENERATOR}
    -P ${PROJECT_SOURCE_DIR}/tests/packaging/subdirectory.cmake)
add_test(NAME Packaging.TheExampleOfTheReadmeCompiles
  COMMAND Python3::Interpreter ${PROJECT_SOURCE_DIR}/tests/packaging/readme_test.py
    ${PROJECT_SOURCE_DIR} ${CMAKE_CXX_COMPILER})
set_tests_properties(Tree.IsTidy Tree.TidyFindsEachViolation
  Packaging.AnInstalledLibraryIsFoundAndUsed Packaging.ASubdirectoryKeepsToItself
  Packaging.TheExampleOfTheReadmeCompiles
  PROPERTIES TIMEOUT 300)

# The tools, run from outside: by gtest cases (tests/cli) and by scripts.
if(NOT STRANDLINE_TOOLS)
  message(FATAL_ERROR "The tests run the tools: STRANDLINE_TESTS needs STRANDLINE_TOOLS=ON")
endif()
add_dependencies(strandline_tests strandline_cli strandline_trainer)
add_test(NAME Trainer.ResumesBitForBit
  COMMAND Python3::Interpreter ${PROJECT_SOURCE_DIR}/tests/crash/trainer_test.py
    $<TARGET_FILE:strandline_trainer>)
set_tests_properties(Trainer.ResumesBitForBit PROPERTIES TIMEOUT 300)

# A save that is killed at each of its system calls.
add_executable(strandline_saver tests/crash/saver.cc)
target_link_libraries(strandline_saver PRIVATE strandline_testing)
add_test(NAME Crash.ASaveKilledAtAnySystemCallLosesNothing
  COMMAND Python3::Interpreter ${PROJECT_SOURCE_DIR}/tests/crash/crash_test.py
    $<TARGET_FILE:strandline_saver>)
set_tests_properties(Crash.ASaveKilledAtAnySystemCallLosesNothing PROPERTIES
  TIMEOUT 600 SKIP_RETURN_CODE 77 RUN_SERIAL ON)
